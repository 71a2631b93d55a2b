"""A product with a weight that is quantized after a low-rank change, differentiable in the two factors.

``y = x @ Q(W + left @ right).T + bias``. The gradient passes straight through the rounding ``Q``: with
``G = grad_y.T @ x`` it is ``G @ right.T`` for ``left`` and ``left.T @ G`` for ``right``, computed without ``G``. The
input's gradient is that of the rounded weight. Forward and backward each go over the weight tile by tile; what is
kept between them is ``x`` and the factors, as for a plain low-rank branch.

Source of the estimator: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tiled
from .precision import product_dtype
from .tiled import WeightTiles

# (left, right, dtype) to the tiles of Q(W + left @ right).
TilesOfUpdate = Callable[[Tensor, Tensor, torch.dtype], WeightTiles]


def straight_through_linear(
    x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, out_features: int, tiles: TilesOfUpdate
) -> Tensor:
    """``x @ Q(W + left @ right).T + bias``, with a straight-through gradient.

    Args:
        x: (..., in_features), floating. Its dtype is the result's; the product runs in ``product_dtype`` of it.
        left: (out_features, r), float32.
        right: (r, in_features), float32.
        bias: (out_features,) or None.
        out_features: rows of the weight.
        tiles: makes the tiles of the quantized sum; the same values each time for the same factors.

    Returns:
        (..., out_features), dtype of ``x``.
    """
    return _StraightThroughLinear.apply(x, left, right, bias, out_features, tiles)


class _StraightThroughLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, n: int, tiles: Any) -> Tensor:
        ctx.save_for_backward(x, left, right)
        ctx.tiles, ctx.bias_dtype = tiles, None if bias is None else bias.dtype
        dtype = product_dtype(x.dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            return tiled.linear(x, tiles(left, right, dtype), bias, n, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        dtype = product_dtype(grad.dtype, grad.device)
        grad_x = grad_left = grad_right = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = tiled.input_gradient(grad, ctx.tiles(left, right, dtype), x.shape[-1], dtype)
            flat_x = x.reshape(-1, x.shape[-1]).float()
            flat_grad = grad.reshape(-1, grad.shape[-1]).float()
            if ctx.needs_input_grad[1]:
                grad_left = flat_grad.t() @ (flat_x @ right.t())
            if ctx.needs_input_grad[2]:
                grad_right = (flat_grad @ left).t() @ flat_x
            if ctx.needs_input_grad[3]:
                grad_bias = tiled.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, grad_left, grad_right, grad_bias, None, None
