"""Pack and unpack whole matrices of codes, on any device. The layout is defined in ``reference.py``."""

import torch
from torch import Tensor

from .reference import PLANES

SUPPORTED_NBITS = tuple(PLANES)


def _plane_bytes(columns: int, width: int) -> int:
    return -(-columns * width // 8)


def packed_row_bytes(columns: int, nbits: int) -> int:
    """Bytes that one packed row of ``columns`` codes takes: ``nbits`` bits a code, each plane padded to a byte.

    Raises:
        ValueError: ``nbits`` is not one of ``SUPPORTED_NBITS``, or ``columns`` is not positive.
    """
    if nbits not in PLANES:
        raise ValueError(f"nbits={nbits!r} is not supported; choose one of {SUPPORTED_NBITS}.")
    if columns <= 0:
        raise ValueError(f"columns={columns} must be positive.")
    return sum(_plane_bytes(columns, width) for width in PLANES[nbits])


def pack(codes: Tensor, nbits: int) -> Tensor:
    """Packed rows of ``codes``.

    Args:
        codes: (rows, columns), uint8, each below ``2**nbits``; higher bits are not looked at.
        nbits: bits per code, one of ``SUPPORTED_NBITS``.

    Returns:
        (rows, packed_row_bytes(columns, nbits)), uint8. Padding bits are zero.

    Raises:
        ValueError: ``codes`` is not a uint8 matrix, or ``nbits`` is not supported.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise ValueError(f"codes must be a uint8 matrix, got {codes.dtype} of shape {tuple(codes.shape)}.")
    rows, columns = codes.shape
    packed = codes.new_zeros(rows, packed_row_bytes(columns, nbits))
    start = shift = 0
    for width in PLANES[nbits]:
        plane_bytes = _plane_bytes(columns, width)
        plane = packed[:, start : start + plane_bytes]
        for slot in range(8 // width):
            part = codes[:, slot * plane_bytes : (slot + 1) * plane_bytes]
            if part.shape[1] == 0:
                break
            bits = (part >> shift) & ((1 << width) - 1)
            plane[:, : part.shape[1]] |= bits << (width * slot)
        start += plane_bytes
        shift += width
    return packed


def unpack(packed: Tensor, nbits: int, columns: int) -> Tensor:
    """Codes that packed rows hold.

    Args:
        packed: (rows, packed_row_bytes(columns, nbits)), uint8.
        nbits: bits per code.
        columns: codes per row.

    Returns:
        (rows, columns), uint8; for 8 bits a view of ``packed``.

    Raises:
        ValueError: ``packed`` is not a uint8 matrix of the width that ``columns`` and ``nbits`` ask for.
    """
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise ValueError(f"packed must be a uint8 matrix, got {packed.dtype} of shape {tuple(packed.shape)}.")
    if packed.shape[1] != packed_row_bytes(columns, nbits):
        raise ValueError(
            f"a packed row of {columns} codes of {nbits} bits takes {packed_row_bytes(columns, nbits)} bytes, "
            f"got {packed.shape[1]}."
        )
    if nbits == 8:
        return packed
    codes = packed.new_empty(packed.shape[0], columns)
    start = shift = 0
    for width in PLANES[nbits]:
        plane_bytes = _plane_bytes(columns, width)
        plane = packed[:, start : start + plane_bytes]
        mask = (1 << width) - 1
        for slot in range(8 // width):
            part = codes[:, slot * plane_bytes : (slot + 1) * plane_bytes]
            if part.shape[1] == 0:
                break
            bits = plane[:, : part.shape[1]] >> (width * slot)
            if slot < 8 // width - 1:
                bits &= mask
            if shift == 0:
                part.copy_(bits)
            else:
                part |= bits << shift
        start += plane_bytes
        shift += width
    return codes
