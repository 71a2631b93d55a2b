"""Dequantize an HQQ weight tile by tile, for the products in ``..tiled``."""

import torch
from torch import Tensor

from ..bitpack import unpack
from ..tiled import WeightTiles, rows_per_tile
from .reference import _grouped


def dequantize_rows(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, rows: slice, into: Tensor
) -> Tensor:
    """The rows ``rows`` of the weight, written to ``into`` (n, in_features). All floats here are float32."""
    into.copy_(unpack(W_q[rows], nbits, into.shape[1]))
    if axis == 1:
        groups, row_scale, row_zero = _grouped(into, scale[rows], zero[rows], axis)
        groups.sub_(row_zero).mul_(row_scale)
        return into
    group_rows = torch.arange(rows.start, rows.stop, device=W_q.device) % scale.shape[0]
    return into.sub_(zero[group_rows]).mul_(scale[group_rows])


def weight_tiles(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int, dtype: torch.dtype
) -> WeightTiles:
    """Row ranges of the weight with their dequantized tile; the tile's memory is reused by the next one."""
    out_features = W_q.shape[0]
    step = rows_per_tile(out_features, in_features, W_q.device)
    buffer = torch.empty(step, in_features, dtype=torch.float32, device=W_q.device)
    cast = buffer if dtype == torch.float32 else torch.empty_like(buffer, dtype=dtype)
    scale, zero = scale.float(), zero.float()
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        n_rows = rows.stop - rows.start
        tile = dequantize_rows(W_q, scale, zero, nbits=nbits, axis=axis, rows=rows, into=buffer[:n_rows])
        yield rows, tile if dtype == torch.float32 else cast[:n_rows].copy_(tile)
