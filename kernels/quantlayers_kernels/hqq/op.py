"""The HQQ operators: schema, shape rule, gradient. What they compute is defined in ``reference.py``.

No dense weight is kept between forward and backward: it is dequantized again, tile by tile. The input is saved only if
``scale`` or ``zero`` requires a gradient.
"""

import torch
from torch import Tensor

from .. import tiled
from ..direct_call import can_skip_operator
from ..precision import product_dtype
from . import cpu, gpu, tiles
from .gradient import metadata_gradient


@torch.library.custom_op("quantlayers::hqq_dequantize", mutates_args=())
def hqq_dequantize(
    W_q: Tensor, scale: Tensor, zero: Tensor, nbits: int, axis: int, in_features: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight that packed HQQ codes stand for; float32 inside, differentiable in ``scale`` and ``zero``.

    Args:
        W_q: packed codes, (out_features, packed_row_bytes(in_features, nbits)), uint8.
        scale: weight units per code step; (out_features, n_groups) for ``axis=1``, (n_groups, in_features) for
            ``axis=0``; floating.
        zero: the code that stands for 0.0, in code units, shaped like ``scale``.
        nbits: bits per code.
        axis: 1 for groups along the inputs of a row, 0 for groups along the outputs of a column.
        in_features: codes per row.
        dtype: floating dtype of the result.

    Returns:
        (out_features, in_features), ``dtype``.
    """
    written = tiles.written_dtype(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features, dtype=dtype)
    weight = torch.empty(W_q.shape[0], in_features, dtype=written, device=W_q.device)
    tiles.dequantize_rows(W_q, scale, zero, nbits=nbits, axis=axis, rows=slice(0, W_q.shape[0]), into=weight)
    return weight.to(dtype)


@hqq_dequantize.register_fake
def _(W_q, scale, zero, nbits, axis, in_features, dtype):
    return W_q.new_empty(W_q.shape[0], in_features, dtype=dtype)


@torch.library.custom_op("quantlayers::hqq_linear", mutates_args=())
def hqq_linear(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, nbits: int, axis: int
) -> Tensor:
    """``x @ weight.T + bias`` straight from packed HQQ codes; differentiable in all floating arguments.

    Args:
        x: (..., in_features), floating. Its dtype is the result's; the product runs in :func:`product_dtype` of it,
            and for few tokens on a CPU, or one token on a GPU, in float32.
        W_q, scale, zero, nbits, axis: as for :func:`hqq_dequantize`.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), dtype of ``x``.
    """
    return _multiply(x, W_q, scale, zero, bias, nbits, axis)


@hqq_linear.register_fake
def _(x, W_q, scale, zero, bias, nbits, axis):
    return x.new_empty(*x.shape[:-1], W_q.shape[0])


def linear(
    x: Tensor,
    W_q: Tensor,
    scale: Tensor,
    zero: Tensor,
    bias: Tensor | None,
    nbits: int,
    axis: int,
    activation_bits: int | None = None,
) -> Tensor:
    """:func:`hqq_linear`, without the cost of an operator where :func:`can_skip_operator` allows it.

    There alone, and where :func:`cpu.can_use_few_tokens` says so, are activations rounded to ``activation_bits``.
    """
    if not can_skip_operator(x, W_q, scale, zero, bias):
        return hqq_linear(x, W_q, scale, zero, bias, nbits, axis)
    if activation_bits is not None and cpu.can_use_few_tokens(
        x, W_q, scale, zero, bias, nbits=nbits, axis=axis, activation_bits=activation_bits
    ):
        return cpu.linear_few_tokens(x, W_q, scale, zero, bias, nbits=nbits, activation_bits=activation_bits)
    return _multiply(x, W_q, scale, zero, bias, nbits, axis)


def _multiply(
    x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, nbits: int, axis: int
) -> Tensor:
    if cpu.can_use_few_tokens(x, W_q, scale, zero, bias, nbits=nbits, axis=axis):
        return cpu.linear_few_tokens(x, W_q, scale, zero, bias, nbits=nbits)
    if gpu.can_use_few_tokens(x, W_q, scale, zero, bias, nbits=nbits, axis=axis):
        return gpu.linear_few_tokens(x, W_q, scale, zero, bias, nbits=nbits)
    dtype = product_dtype(x.dtype, x.device)
    weight = tiles.weight_tiles(W_q, scale, zero, nbits=nbits, axis=axis, in_features=x.shape[-1], dtype=dtype)
    return tiled.linear(x, weight, bias, W_q.shape[0], dtype)


@torch.library.custom_op("quantlayers::hqq_input_gradient", mutates_args=())
def hqq_input_gradient(
    grad: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, nbits: int, axis: int, in_features: int
) -> Tensor:
    """``grad @ weight``: (..., out_features) to (..., in_features), dtype of ``grad``. Not differentiable."""
    dtype = product_dtype(grad.dtype, grad.device)
    weight = tiles.weight_tiles(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features, dtype=dtype)
    return tiled.input_gradient(grad, weight, in_features, dtype)


@hqq_input_gradient.register_fake
def _(grad, W_q, scale, zero, nbits, axis, in_features):
    return grad.new_empty(*grad.shape[:-1], in_features)


@torch.library.custom_op("quantlayers::hqq_metadata_gradient", mutates_args=())
def hqq_metadata_gradient(
    grad_weight: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, nbits: int, axis: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``scale`` and ``zero`` from the gradient of the dense weight (out_features, in_features)."""
    tiled.check_rows(grad_weight.shape[0], W_q.shape[0])
    return metadata_gradient(
        tiled.row_tiles(grad_weight), W_q, scale, zero, nbits=nbits, axis=axis, in_features=grad_weight.shape[1]
    )


@hqq_metadata_gradient.register_fake
def _(grad_weight, W_q, scale, zero, nbits, axis):
    return scale.new_empty(scale.shape), zero.new_empty(zero.shape)


@torch.library.custom_op("quantlayers::hqq_linear_metadata_gradient", mutates_args=())
def hqq_linear_metadata_gradient(
    grad: Tensor, x: Tensor, W_q: Tensor, scale: Tensor, zero: Tensor, nbits: int, axis: int
) -> tuple[Tensor, Tensor]:
    """Gradients of ``scale`` and ``zero`` from that of a product (..., out_features) and its ``x``, tile by tile."""
    tiled.check_rows(grad.shape[-1], W_q.shape[0])
    return metadata_gradient(
        tiled.weight_gradient_tiles(grad, x), W_q, scale, zero, nbits=nbits, axis=axis, in_features=x.shape[-1]
    )


@hqq_linear_metadata_gradient.register_fake
def _(grad, x, W_q, scale, zero, nbits, axis):
    return scale.new_empty(scale.shape), zero.new_empty(zero.shape)


def _save_for_dequantize(ctx, inputs, output):
    W_q, scale, zero, ctx.nbits, ctx.axis, _, _ = inputs
    ctx.save_for_backward(W_q, scale, zero)


def _dequantize_backward(ctx, grad):
    grad_scale, grad_zero = hqq_metadata_gradient(grad, *ctx.saved_tensors, ctx.nbits, ctx.axis)
    return None, grad_scale, grad_zero, None, None, None, None


hqq_dequantize.register_autograd(_dequantize_backward, setup_context=_save_for_dequantize)


def _save_for_linear(ctx, inputs, output):
    x, W_q, scale, zero, bias, ctx.nbits, ctx.axis = inputs
    ctx.in_features = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_x = scale.requires_grad or zero.requires_grad
    ctx.save_for_backward(W_q, scale, zero, *([x] if ctx.has_x else []))


def _linear_backward(ctx, grad):
    W_q, scale, zero, *saved_x = ctx.saved_tensors
    grad_x = grad_scale = grad_zero = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = hqq_input_gradient(grad, W_q, scale, zero, ctx.nbits, ctx.axis, ctx.in_features)
    if ctx.has_x:
        grad_scale, grad_zero = hqq_linear_metadata_gradient(grad, *saved_x, W_q, scale, zero, ctx.nbits, ctx.axis)
    if ctx.needs_input_grad[4]:
        grad_bias = tiled.bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, grad_scale, grad_zero, grad_bias, None, None


hqq_linear.register_autograd(_linear_backward, setup_context=_save_for_linear)
