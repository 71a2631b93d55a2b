"""llama.cpp's blocks of 32 weights, as bytes. Pure maths on numpy arrays.

Source: ``ggml-common.h`` (``block_q4_1``, ``block_q5_1``, ``block_q8_0``).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .uniform_grid import UniformGrid

BLOCK = 32
Bytes = NDArray[np.uint8]


def affine_blocks(grid: UniformGrid) -> Bytes:
    """``d * code + m`` with d and m in float16: Q4_1 up to 4 bits, Q5_1 for 5.

    Each block begins with d, the scale, and m, which is ``-scale * zero``. Byte j of the codes holds those of j and
    j + 16; Q5_1 has the fifth bits before them, in one word of 32 bits.

    Args:
        grid: groups of ``BLOCK``, at most 5 bits.

    Returns:
        (out_features, n_blocks * bytes of a block), uint8.
    """
    rows, n_blocks = grid.scale.shape
    codes = grid.codes.view(rows, n_blocks, BLOCK).numpy()
    parts = [_halves(grid.scale), _halves(-grid.scale * grid.zero)]
    if grid.nbits > 4:
        fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")
        parts.append(fifth.reshape(rows, n_blocks, 4))
    low = codes & np.uint8(15)
    parts.append(low[..., :16] | low[..., 16:] << np.uint8(4))
    return np.concatenate(parts, axis=-1).reshape(rows, -1)


def affine_weight(grid: UniformGrid) -> Tensor:
    """What readers compute from :func:`affine_blocks`, (out_features, in_features), float32."""
    d, m = grid.scale.half().float().unsqueeze(-1), (-grid.scale * grid.zero).half().float().unsqueeze(-1)
    return (grid.codes.float().view(*grid.scale.shape, -1) * d + m).view(grid.codes.shape)


def eight_bit_blocks(weight: Tensor) -> tuple[Bytes, Tensor]:
    """Q8_0 of a weight (out_features, in_features), float32: one float16 and 32 signed bytes a block.

    Returns:
        The bytes (out_features, n_blocks * 34); and what readers compute from them.
    """
    rows = len(weight)
    blocks = weight.view(rows, -1, BLOCK)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)
    codes = (blocks * inverse).round().to(torch.int8)
    packed = np.concatenate([_halves(scale.squeeze(-1)), codes.view(torch.uint8).numpy()], axis=-1)
    return packed.reshape(rows, -1), (codes.float() * scale.half().float()).view(weight.shape)


def _halves(values: Tensor) -> Bytes:
    """float16 of (rows, n_blocks), as two bytes each: (rows, n_blocks, 2)."""
    return values.half().contiguous().view(torch.uint8).view(*values.shape, 2).numpy()
