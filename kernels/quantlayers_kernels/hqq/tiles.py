"""Dequantize an HQQ weight tile by tile, for the products in ``..tiled``."""

from functools import partial

import torch
from torch import Tensor

from .. import native
from ..bitpack import unpack
from ..gpu_probe import can_read
from ..tiled import WeightTiles, buffered_tiles
from . import cpu, gpu
from .reference import _grouped


def written_dtype(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int, dtype: torch.dtype
) -> torch.dtype:
    """The dtype that :func:`dequantize_rows` is to write where ``dtype`` is wanted: the same, or float32."""
    if dtype == torch.float32:
        return dtype
    for where, can_write in ((gpu, can_read(dtype, W_q.device)), (cpu, dtype in native.WRITTEN)):
        if can_write and where.can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features):
            return dtype
    return torch.float32


def dequantize_rows(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, rows: slice, into: Tensor
) -> Tensor:
    """The rows ``rows`` of the weight, written to ``into`` (n, in_features), contiguous, of :func:`written_dtype`."""
    if gpu.can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=into.shape[1]):
        return gpu.dequantize_rows(W_q, scale, zero, nbits=nbits, rows=rows, into=into)
    if cpu.can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=into.shape[1]):
        return cpu.dequantize_rows(W_q, scale, zero, nbits=nbits, axis=axis, rows=rows, into=into)
    into.copy_(unpack(W_q[rows], nbits, into.shape[1]))
    if axis == 1:
        groups, row_scale, row_zero = _grouped(into, scale[rows].float(), zero[rows].float(), axis)
        groups.sub_(row_zero).mul_(row_scale)
        return into
    group_rows = torch.arange(rows.start, rows.stop, device=W_q.device) % scale.shape[0]
    return into.sub_(zero[group_rows].float()).mul_(scale[group_rows].float())


def weight_tiles(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int, dtype: torch.dtype
) -> WeightTiles:
    """Row ranges of the weight with their dequantized tile; the tile's memory is reused by the next one."""
    dequantize = partial(dequantize_rows, W_q, scale, zero, nbits=nbits, axis=axis)
    written = written_dtype(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features, dtype=dtype)
    return buffered_tiles(dequantize, W_q.shape[0], in_features, dtype=dtype, device=W_q.device, written=written)
