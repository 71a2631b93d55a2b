"""Products with a weight that is rounded after a low-rank delta, differentiable in the two factors.

``y = x @ Q(W + left @ right).T + bias``. The gradient passes straight through the rounding ``Q``: with
``G = grad_y.T @ x`` it is ``G @ right.T`` for ``left`` and ``left.T @ G`` for ``right``, computed without ``G``. The
input's gradient is that of the rounded weight. Saved for the backward pass are ``x`` and the factors, as for a plain
low-rank branch.

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
    x: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    out_features: int,
    tiles: TilesOfUpdate,
    *,
    input_of_factors: Tensor | None = None,
) -> Tensor:
    """``x @ Q(W + left @ right).T + bias``, with a straight-through gradient.

    Args:
        x: (..., in_features), floating. Its dtype is the result's; the product runs in ``product_dtype`` of it.
        left: (out_features, r), float32.
        right: (r, in_features), float32.
        bias: (out_features,) or None.
        out_features: rows of the weight.
        tiles: makes the tiles of the quantized sum; the same values each time for the same factors.
        input_of_factors: what ``left @ right`` is a delta for, (..., in_features), where the tiles are those of a
            weight in another basis, in which ``x`` is; None for ``x``.

    Returns:
        (..., out_features), dtype of ``x``.
    """
    y = _RoundedLinear.apply(x, left.detach(), right.detach(), bias, out_features, tiles)
    return straight_through(y, x if input_of_factors is None else input_of_factors, left, right)


def straight_through(y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``y``, in place, with the gradients of ``x @ (left @ right).T`` for the two factors beside its own.

    Args:
        y: (..., out_features), floating: the product of ``x`` with the rounded weight.
        x, left, right: as for :func:`straight_through_linear`.
    """
    return _StraightThrough.apply(y, x.detach(), left, right)


class _RoundedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor, bias: Tensor | None, n: int, tiles: Any) -> Tensor:
        ctx.save_for_backward(left, right)
        ctx.tiles, ctx.bias_dtype, ctx.in_features = tiles, None if bias is None else bias.dtype, x.shape[-1]
        dtype = product_dtype(x.dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            return tiled.linear(x, tiles(left, right, dtype), bias, n, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        dtype = product_dtype(grad.dtype, grad.device)
        grad_x = grad_bias = None
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                grad_x = tiled.input_gradient(grad, ctx.tiles(left, right, dtype), ctx.in_features, dtype)
            if ctx.needs_input_grad[3]:
                grad_bias = tiled.bias_gradient(grad, ctx.bias_dtype)
        return grad_x, None, None, grad_bias, None, None


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(x, left, right)
        # Not a view: callers add to the result in place.
        ctx.mark_dirty(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right = ctx.saved_tensors
        grad_left = grad_right = None
        with torch.autocast(grad.device.type, enabled=False):
            flat_x = x.reshape(-1, x.shape[-1]).float()
            flat_grad = grad.reshape(-1, grad.shape[-1]).float()
            if ctx.needs_input_grad[2]:
                grad_left = flat_grad.t() @ (flat_x @ right.t())
            if ctx.needs_input_grad[3]:
                grad_right = (flat_grad @ left).t() @ flat_x
        return grad, None, grad_left, grad_right
