"""The packed layout, one code at a time: the definition that the fast functions must match.

A width that does not divide eight is split into planes that do, lowest bits first (3 = 2 + 1, 5 = 4 + 1,
6 = 4 + 2), so that a row takes exactly ``nbits`` bits a code. A plane of ``p`` bits holds ``8 / p`` codes a
byte: with ``B = ceil(columns * p / 8)`` bytes in the plane's row, code ``k`` lies in byte ``k % B`` at bit
``p * (k // B)``. Neighbouring codes thus lie in neighbouring bytes, and unpacking is a few contiguous
masks and shifts. Rows are independent: nothing crosses from one row to the next.
"""

import torch
from torch import Tensor

PLANES = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def pack_reference(codes: Tensor, nbits: int) -> Tensor:
    """Packed ``codes``, one Python integer at a time. Shapes and dtypes as in :func:`..packing.pack`."""
    rows, columns = codes.shape
    packed_rows = []
    for row in codes.tolist():
        packed_row, shift = [], 0
        for width in PLANES[nbits]:
            plane = [0] * -(-columns * width // 8)
            for column, code in enumerate(row):
                bits = (code >> shift) & ((1 << width) - 1)
                plane[column % len(plane)] |= bits << (width * (column // len(plane)))
            packed_row += plane
            shift += width
        packed_rows.append(packed_row)
    width_in_bytes = sum(-(-columns * width // 8) for width in PLANES[nbits])
    return torch.tensor(packed_rows, dtype=torch.uint8, device=codes.device).reshape(rows, width_in_bytes)


def unpack_reference(packed: Tensor, nbits: int, columns: int) -> Tensor:
    """Codes of ``packed``, one Python integer at a time. Shapes and dtypes as in :func:`..packing.unpack`."""
    code_rows = []
    for packed_row in packed.tolist():
        codes, shift, start = [0] * columns, 0, 0
        for width in PLANES[nbits]:
            plane_bytes = -(-columns * width // 8)
            for column in range(columns):
                byte = packed_row[start + column % plane_bytes]
                bits = (byte >> (width * (column // plane_bytes))) & ((1 << width) - 1)
                codes[column] |= bits << shift
            start += plane_bytes
            shift += width
        code_rows.append(codes)
    return torch.tensor(code_rows, dtype=torch.uint8, device=packed.device).reshape(len(code_rows), columns)
