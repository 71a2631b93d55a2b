"""Dequantize an AQLM weight tile by tile, for the products in ``..tiled``."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .. import native
from ..gpu_probe import can_read
from ..tiled import WeightTiles, buffered_tiles, rows_per_tile
from . import cpu, gpu
from .layout import dense_shape


def flat_index(codes: Tensor, size: int) -> Tensor:
    """Rows of the flattened codebooks that each group sums, (n_groups, num_codebooks), int32.

    Masking makes any stored code a valid one, so that no code can read outside of its codebook.
    """
    num_codebooks = codes.shape[-1]
    first = torch.arange(num_codebooks, dtype=torch.int32, device=codes.device) * size
    return ((codes.int() & (size - 1)) + first).view(-1, num_codebooks)


def dequantize_out_groups(
    codes: Tensor, table: Tensor, scales: Tensor, *, size: int, shape: tuple[int, int]
) -> Tensor:
    """The weight rows of some output groups, float32, (n_out_groups * og, in_features).

    Args:
        codes: (n_out_groups, n_in_groups, num_codebooks), int8 or int16.
        table: the codebooks as a float32 matrix, (num_codebooks * size, og * ig).
        scales: (n_out_groups, 1, 1, 1), float32.
        size: entries of one codebook.
        shape: (og, ig).
    """
    out_group, in_group = shape
    n_out, n_in, _ = codes.shape
    weight = embedding_bag(flat_index(codes, size), table, mode="sum")
    weight = weight.view(n_out, n_in, out_group, in_group)
    weight.mul_(scales)
    if out_group > 1:
        weight = weight.permute(0, 2, 1, 3)
    return weight.reshape(n_out * out_group, n_in * in_group)


def weight_tiles(codes: Tensor, codebooks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> WeightTiles:
    """Row ranges of the weight with their dequantized tile; the tile's memory may be reused by the next one."""
    num_codebooks, size, out_group, in_group = codebooks.shape
    on_cpu, on_gpu = (where.can_dequantize(codes, codebooks, scales) for where in (cpu, gpu))
    if on_cpu or on_gpu:
        dequantize = partial((cpu if on_cpu else gpu).dequantize_rows, codes, codebooks, scales)
        can_write = dtype in native.WRITTEN if on_cpu else can_read(dtype, codes.device)
        written = dtype if can_write else torch.float32
        shape = dense_shape(codes, codebooks)
        yield from buffered_tiles(dequantize, *shape, dtype=dtype, device=codes.device, written=written)
        return
    table = codebooks.float().reshape(num_codebooks * size, out_group * in_group)
    scales = scales.float()
    n_out = codes.shape[0]
    step = rows_per_tile(*dense_shape(codes, codebooks), codes.device, multiple=out_group) // out_group
    for start in range(0, n_out, step):
        part = slice(start, min(start + step, n_out))
        tile = dequantize_out_groups(codes[part], table, scales[part], size=size, shape=(out_group, in_group))
        yield slice(part.start * out_group, part.stop * out_group), tile.to(dtype)
