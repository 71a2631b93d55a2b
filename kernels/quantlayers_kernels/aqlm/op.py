"""The AQLM operators: schema, shape rule, gradient. What they compute is defined in ``reference.py``.

No dense weight is kept between forward and backward, and gradients of the dense weight come tile by tile. The input is
saved only if the codebooks require a gradient; for scales alone the output is enough.
"""

import torch
from torch import Tensor

from .. import native, tiled
from ..direct_call import can_skip_operator
from ..gpu_probe import can_read
from ..precision import product_dtype
from . import cpu, gpu
from .gradient import metadata_gradient
from .layout import dense_shape
from .tiles import weight_tiles


@torch.library.custom_op("quantlayers::aqlm_dequantize", mutates_args=())
def aqlm_dequantize(codes: Tensor, codebooks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The dense weight that AQLM codes stand for; float32 inside, differentiable in codebooks and scales.

    Args:
        codes: (out_features / og, in_features / ig, num_codebooks), int8 or int16; read modulo the codebook's size.
        codebooks: (num_codebooks, 2**nbits_per_codebook, og, ig), floating.
        scales: weight units per codebook unit, (out_features / og, 1, 1, 1), floating.
        dtype: floating dtype of the result.

    Returns:
        (out_features, in_features), ``dtype``.
    """
    weight = torch.empty(*dense_shape(codes, codebooks), dtype=dtype, device=codes.device)
    whole = slice(0, weight.shape[0])
    if dtype in native.WRITTEN and cpu.can_dequantize(codes, codebooks, scales):
        return cpu.dequantize_rows(codes, codebooks, scales, rows=whole, into=weight)
    if can_read(dtype, codes.device) and gpu.can_dequantize(codes, codebooks, scales):
        return gpu.dequantize_rows(codes, codebooks, scales, rows=whole, into=weight)
    for rows, tile in weight_tiles(codes, codebooks, scales, dtype=dtype):
        weight[rows] = tile
    return weight


@aqlm_dequantize.register_fake
def _(codes, codebooks, scales, dtype):
    return codes.new_empty(*dense_shape(codes, codebooks), dtype=dtype)


@torch.library.custom_op("quantlayers::aqlm_linear", mutates_args=())
def aqlm_linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias`` from AQLM codes; differentiable in all floating arguments.

    Args:
        x: (..., in_features), floating. Its dtype is the result's; the product runs in :func:`product_dtype` of it,
            and for few tokens on a CPU, or one token on a GPU, in float32.
        codes, codebooks, scales: as for :func:`aqlm_dequantize`.
        bias: (out_features,) or None.

    Returns:
        (..., out_features), dtype of ``x``.
    """
    return _multiply(x, codes, codebooks, scales, bias)


@aqlm_linear.register_fake
def _(x, codes, codebooks, scales, bias):
    return x.new_empty(*x.shape[:-1], dense_shape(codes, codebooks)[0])


def linear(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """:func:`aqlm_linear`, without the cost of an operator where :func:`can_skip_operator` allows it."""
    if can_skip_operator(x, codes, codebooks, scales, bias):
        return _multiply(x, codes, codebooks, scales, bias)
    return aqlm_linear(x, codes, codebooks, scales, bias)


def _multiply(x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    if cpu.can_use_few_tokens(x, codes, codebooks, scales, bias):
        return cpu.linear_few_tokens(x, codes, codebooks, scales, bias)
    if gpu.can_use_few_tokens(x, codes, codebooks, scales, bias):
        return gpu.linear_few_tokens(x, codes, codebooks, scales, bias)
    dtype = product_dtype(x.dtype, x.device)
    return tiled.linear(
        x, weight_tiles(codes, codebooks, scales, dtype=dtype), bias, dense_shape(codes, codebooks)[0], dtype
    )


@torch.library.custom_op("quantlayers::aqlm_input_gradient", mutates_args=())
def aqlm_input_gradient(grad: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """``grad @ weight``: (..., out_features) to (..., in_features), dtype of ``grad``. Not differentiable."""
    dtype = product_dtype(grad.dtype, grad.device)
    tiles = weight_tiles(codes, codebooks, scales, dtype=dtype)
    return tiled.input_gradient(grad, tiles, dense_shape(codes, codebooks)[1], dtype)


@aqlm_input_gradient.register_fake
def _(grad, codes, codebooks, scales):
    return grad.new_empty(*grad.shape[:-1], dense_shape(codes, codebooks)[1])


@torch.library.custom_op("quantlayers::aqlm_metadata_gradient", mutates_args=())
def aqlm_metadata_gradient(
    grad_weight: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of codebooks and scales from the gradient of the dense weight (out_features, in_features)."""
    tiled.check_rows(grad_weight.shape[0], dense_shape(codes, codebooks)[0])
    tiles = tiled.row_tiles(grad_weight, multiple=codebooks.shape[2])
    return metadata_gradient(tiles, codes, codebooks, scales)


@aqlm_metadata_gradient.register_fake
def _(grad_weight, codes, codebooks, scales):
    return codebooks.new_empty(codebooks.shape), scales.new_empty(scales.shape)


@torch.library.custom_op("quantlayers::aqlm_linear_metadata_gradient", mutates_args=())
def aqlm_linear_metadata_gradient(
    grad: Tensor, x: Tensor, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of codebooks and scales from that of a product (..., out_features) and its ``x``, tile by tile."""
    tiled.check_rows(grad.shape[-1], dense_shape(codes, codebooks)[0])
    tiles = tiled.weight_gradient_tiles(grad, x, multiple=codebooks.shape[2])
    return metadata_gradient(tiles, codes, codebooks, scales)


@aqlm_linear_metadata_gradient.register_fake
def _(grad, x, codes, codebooks, scales):
    return codebooks.new_empty(codebooks.shape), scales.new_empty(scales.shape)


def _save_for_dequantize(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _dequantize_backward(ctx, grad):
    return None, *aqlm_metadata_gradient(grad, *ctx.saved_tensors), None


aqlm_dequantize.register_autograd(_dequantize_backward, setup_context=_save_for_dequantize)


def _scale_gradient(grad: Tensor, y: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    """Gradient of the scales from that of ``y``, each row of which is its scale times a product."""
    grad, y = grad.reshape(-1, grad.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
    products = y if bias is None else y - bias.float()
    with torch.autocast(grad.device.type, enabled=False):
        rows = torch.linalg.vecdot(grad, products, dim=0)
    flat = scales.float().flatten()
    per_scale = rows.view(flat.numel(), -1).sum(1) / torch.where(flat == 0, torch.inf, flat)
    return per_scale.view(scales.shape).to(scales.dtype)


def _save_for_linear(ctx, inputs, output):
    x, codes, codebooks, scales, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.has_x = codebooks.requires_grad
    ctx.has_output = scales.requires_grad and not ctx.has_x
    saved = [x] if ctx.has_x else [output, bias] if ctx.has_output else []
    ctx.save_for_backward(codes, codebooks, scales, *saved)


def _linear_backward(ctx, grad):
    codes, codebooks, scales, *saved = ctx.saved_tensors
    grad_x = grad_codebooks = grad_scales = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = aqlm_input_gradient(grad, codes, codebooks, scales)
    if ctx.has_x:
        grad_codebooks, grad_scales = aqlm_linear_metadata_gradient(grad, *saved, codes, codebooks, scales)
    if ctx.has_output:
        grad_scales = _scale_gradient(grad, saved[0], saved[1], scales)
    if ctx.needs_input_grad[4]:
        grad_bias = tiled.bias_gradient(grad, ctx.bias_dtype)
    return grad_x, None, grad_codebooks, grad_scales, grad_bias


aqlm_linear.register_autograd(_linear_backward, setup_context=_save_for_linear)
