"""The path of many tokens: dequantize a tile of rows into a reused buffer, then a BLAS product, tile by tile.

A tile stays in cache between being written and being read, and no dense weight is ever allocated: past
32 MiB such an allocation alone costs more than the product of a few hundred tokens, because the C library
maps fresh pages for it each time.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..bitpack import unpack
from .reference import _grouped

# CPU: 4 MiB of float32, in the last-level cache of any CPU of the last ten years, and large enough for BLAS.
# Elsewhere a launch costs more than a cache miss, and 256 MiB holds all but the largest layers whole.
CPU_TILE_ELEMENTS = 1 << 20
DEVICE_TILE_ELEMENTS = 1 << 26


def _rows_per_tile(out_features: int, in_features: int, device: torch.device) -> int:
    elements = CPU_TILE_ELEMENTS if device.type == "cpu" else DEVICE_TILE_ELEMENTS
    return max(1, min(out_features, elements // in_features))


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
) -> Iterator[tuple[slice, Tensor]]:
    """Row ranges of the weight with their dequantized tile; the tile's memory is reused by the next one."""
    out_features = W_q.shape[0]
    step = _rows_per_tile(out_features, in_features, W_q.device)
    buffer = torch.empty(step, in_features, dtype=torch.float32, device=W_q.device)
    cast = buffer if dtype == torch.float32 else torch.empty_like(buffer, dtype=dtype)
    scale, zero = scale.float(), zero.float()
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        n_rows = rows.stop - rows.start
        tile = dequantize_rows(W_q, scale, zero, nbits=nbits, axis=axis, rows=rows, into=buffer[:n_rows])
        yield rows, tile if dtype == torch.float32 else cast[:n_rows].copy_(tile)


def linear(x: Tensor, tiles: Iterator[tuple[slice, Tensor]], bias: Tensor | None, *, into: Tensor) -> None:
    """``x @ weight.T + bias`` into (tokens, out_features), from (tokens, in_features); all in the tiles' dtype."""
    for rows, tile in tiles:
        if bias is None:
            torch.mm(x, tile.t(), out=into[:, rows])
        else:
            torch.addmm(bias[rows], x, tile.t(), out=into[:, rows])


def input_gradient(grad: Tensor, tiles: Iterator[tuple[slice, Tensor]], *, into: Tensor) -> None:
    """``grad @ weight`` into (tokens, in_features), from (tokens, out_features); all in the tiles' dtype."""
    into.zero_()
    for rows, tile in tiles:
        into.addmm_(grad[:, rows], tile)
