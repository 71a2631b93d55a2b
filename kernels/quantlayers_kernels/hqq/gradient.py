"""Gradients of HQQ's scales and zeros from that of the dense weight, which comes tile by tile."""

import torch
from torch import Tensor

from ..tiled import WeightTiles
from . import cpu
from .tiles import dequantize_rows


def metadata_gradient(
    gradient_tiles: WeightTiles, W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int
) -> tuple[Tensor, Tensor]:
    """``sum(G * (code - zero))`` over each group, and ``-scale * sum(G)``; in the dtypes of ``scale`` and ``zero``.

    Args:
        gradient_tiles: ranges of rows with their part of G, (n_rows, in_features), floating; the first is the largest.
        W_q, scale, zero, nbits, axis, in_features: as for :func:`.op.hqq_dequantize`.
    """
    grad_scale = torch.zeros(scale.shape, dtype=torch.float32, device=scale.device)
    grads = (grad_scale, torch.zeros_like(grad_scale))
    if axis == 1 and cpu.can_dequantize(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features):
        weight = (W_q.contiguous(), scale.contiguous(), zero.contiguous())
        for rows, tile in gradient_tiles:
            cpu.metadata_gradient_of_rows(tile.float().contiguous(), *weight, nbits=nbits, rows=rows, into=grads)
    else:
        _gather(gradient_tiles, W_q, scale, zero, nbits=nbits, axis=axis, into=grads)
    return grads[0].to(scale.dtype), grads[1].to(zero.dtype)


def _gather(
    gradient_tiles: WeightTiles,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    *,
    nbits: int,
    axis: int,
    into: tuple[Tensor, Tensor],
) -> None:
    ones, zero32 = torch.ones_like(zero, dtype=torch.float32), zero.float()
    grad_scale, grad_zero = into
    buffer = None
    for rows, tile in gradient_tiles:
        gradient = tile.float()
        if buffer is None:
            buffer = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        steps = dequantize_rows(W_q, ones, zero32, nbits=nbits, axis=axis, rows=rows, into=buffer[: len(gradient)])
        steps *= gradient
        if axis == 1:
            shape = (len(gradient), scale.shape[1], -1)
            torch.sum(steps.view(shape), -1, out=grad_scale[rows])
            torch.sum(gradient.reshape(shape), -1, out=grad_zero[rows])
        else:
            group_rows = torch.arange(rows.start, rows.stop, device=W_q.device) % scale.shape[0]
            grad_scale.index_add_(0, group_rows, steps)
            grad_zero.index_add_(0, group_rows, gradient)
    grad_zero *= -scale.float()
