"""Rows of codes as bit strings: the one layout that MLX, compressed-tensors, humming and GPTQ share. Pure maths.

The bits of a row follow each other without gaps, the least significant bit of each code first, in little-endian words
of 32 bits; codes of 3, 5, 6 and 7 bits cross from one word into the next. Our own layout
(``quantlayers_kernels.bitpack``) is another one.
"""

import torch
from torch import Tensor

WORD_BITS = 32
_ROWS = 256


def pack_rows(codes: Tensor, nbits: int) -> Tensor:
    """Dense bit strings of the rows of ``codes``.

    Args:
        codes: (rows, columns), uint8, each below ``2**nbits``.
        nbits: bits per code, 1 to 8.

    Returns:
        (rows, ceil(columns * nbits / 32)), int32; the bits after the last code are zero.
    """
    rows, columns = codes.shape
    n_words = -(-columns * nbits // WORD_BITS)
    octets = torch.zeros(rows, n_words * WORD_BITS // 8, dtype=torch.uint8)
    filled = -(-columns * nbits // 8)
    # Rows at a time, since what lies between codes and bytes has one byte for each bit.
    for start in range(0, rows, _ROWS):
        bits = (codes[start : start + _ROWS].unsqueeze(-1) >> torch.arange(nbits, dtype=torch.uint8)) & 1
        stream = torch.nn.functional.pad(bits.flatten(1), (0, 8 * filled - columns * nbits)).unflatten(1, (-1, 8))
        octets[start : start + _ROWS, :filled] = (stream << torch.arange(8, dtype=torch.uint8)).sum(
            -1, dtype=torch.uint8
        )
    return octets.view(torch.int32)


def unpack_rows(packed: Tensor, nbits: int, columns: int) -> Tensor:
    """The codes (rows, columns), uint8, that :func:`pack_rows` packed."""
    octets = packed.contiguous().view(torch.uint8)
    bits = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    codes = bits.reshape(len(packed), -1)[:, : columns * nbits].reshape(len(packed), columns, nbits)
    return (codes << torch.arange(nbits, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
