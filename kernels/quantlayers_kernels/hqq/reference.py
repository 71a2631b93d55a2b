"""What an HQQ weight means: ``(code - zero) * scale``, in float32. Every fast path must match this file.

Groups: with ``axis=1`` a group is ``group_size`` neighbouring inputs of one output row, and ``scale`` is
(out_features, in_features / group_size). With ``axis=0`` a group is ``group_size`` outputs of one input
column, ``out_features / group_size`` rows apart, and ``scale`` is (out_features / group_size, in_features):
the grouping of Badri & Shaji's ``hqq`` package.
"""

import torch
from torch import Tensor

from ..bitpack import unpack


def dequantize_hqq_reference(
    W_q: Tensor, scale: Tensor, zero: Tensor, *, nbits: int, axis: int, in_features: int
) -> Tensor:
    """(out_features, in_features), float32, of packed codes (out_features, row bytes) uint8."""
    codes = unpack(W_q, nbits, in_features).float()
    groups, scale, zero = _grouped(codes, scale.float(), zero.float(), axis)
    return ((groups - zero) * scale).reshape(codes.shape)


def _grouped(matrix: Tensor, scale: Tensor, zero: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """``matrix`` viewed by groups, and ``scale`` and ``zero`` so that they broadcast over it."""
    out_features, in_features = matrix.shape
    if axis == 1:
        return matrix.view(out_features, scale.shape[1], -1), scale.unsqueeze(-1), zero.unsqueeze(-1)
    return matrix.view(-1, scale.shape[0], in_features), scale.unsqueeze(0), zero.unsqueeze(0)


def hqq_linear_reference(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, *, nbits: int, axis: int
) -> Tensor:
    """``x @ weight.T + bias`` in float32, given back in the dtype of ``x`` (..., in_features)."""
    weight = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=axis, in_features=x.shape[-1])
    y = torch.nn.functional.linear(x.float(), weight, None if bias is None else bias.float())
    return y.to(x.dtype)
