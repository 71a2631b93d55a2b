"""A linear product with a quantized weight, for any method that can dequantize a range of rows.

``y = x @ W.T + bias``, tile by tile, differentiable in ``x``, ``bias`` and the floating tensors of the weight. No
dense weight is kept between forward and backward: the backward pass dequantizes again, and gradients of the dense
weight exist for one tile at a time. HQQ and AQLM have operators of their own with the same properties; this is the
default for other methods.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from . import tiled
from .precision import product_dtype
from .tiled import WeightTiles

# (tensors, rows, dtype) to the dense rows (n, in_features) of ``dtype``, differentiable in the floating tensors.
DequantizeRows = Callable[[Mapping[str, Tensor], slice, torch.dtype], Tensor]


def tiled_linear(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    dequantize_rows: DequantizeRows,
    bias: Tensor | None,
    *,
    out_features: int,
    multiple: int = 1,
) -> Tensor:
    """``x @ weight.T + bias`` with a weight that is dequantized tile by tile; once differentiable.

    Under ``torch.compile`` all rows are dequantized at once, so that the compiler sees plain operators.

    Args:
        x: (..., in_features), floating. Its dtype is the result's; the product runs in ``product_dtype`` of it, with
            or without autocast.
        tensors: of the quantized weight, codes and metadata. The floating ones may require a gradient.
        dequantize_rows: gives dense rows from ``tensors``. Must depend on no other tensor that requires a gradient.
        bias: (out_features,) or None.
        out_features: rows of the weight.
        multiple: ranges of rows start at multiples of it, and all but the last have a multiple of it as length.

    Returns:
        (..., out_features), dtype of ``x``, in memory of its own.
    """
    if torch.compiler.is_compiling():
        dtype = product_dtype(x.dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(dtype, torch.float32)
            weight = dequantize_rows(tensors, slice(0, out_features), wide).to(dtype)
            return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)
    names, values = tuple(tensors), tuple(tensors.values())
    return _TiledLinear.apply(x, bias, dequantize_rows, names, (out_features, multiple), *values)


class _TiledLinear(torch.autograd.Function):
    """Takes the tensors of the weight last, each as an argument of its own; ``n_rows``: out_features and multiple."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        dequantize_rows: DequantizeRows,
        names: tuple[str, ...],
        n_rows: tuple[int, int],
        *values: Tensor,
    ) -> Tensor:
        trains_metadata = any(ctx.needs_input_grad[5:])
        ctx.save_for_backward(x if trains_metadata else None, *values)
        ctx.dequantize_rows, ctx.names, ctx.n_rows = dequantize_rows, names, n_rows
        ctx.in_features, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype
        dtype = product_dtype(x.dtype, x.device)
        with torch.autocast(x.device.type, enabled=False):
            return tiled.linear(x, _tiles(ctx, values, x.device, dtype), bias, n_rows[0], dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *values = ctx.saved_tensors
        grad_x = grad_bias = None
        grad_values: list[Tensor | None] = [None] * len(values)
        with torch.autocast(grad.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                dtype = product_dtype(grad.dtype, grad.device)
                tiles = _tiles(ctx, values, grad.device, dtype)
                grad_x = tiled.input_gradient(grad, tiles, ctx.in_features, dtype)
            if ctx.needs_input_grad[1]:
                grad_bias = tiled.bias_gradient(grad, ctx.bias_dtype)
            if x is not None:
                grad_values = _metadata_gradients(ctx, grad, x, values)
        return grad_x, grad_bias, None, None, None, *grad_values


def _tiles(ctx: Any, values: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> WeightTiles:
    tensors = dict(zip(ctx.names, values, strict=True))
    out_features, multiple = ctx.n_rows
    for rows in tiled.row_ranges(out_features, ctx.in_features, device, multiple=multiple):
        yield rows, ctx.dequantize_rows(tensors, rows, dtype)


def _metadata_gradients(ctx: Any, grad: Tensor, x: Tensor, values: list[Tensor]) -> list[Tensor | None]:
    """Gradients of the weight's tensors where wanted: each tile is dequantized with a graph of its own."""
    is_wanted = ctx.needs_input_grad[5:]
    leaves = [
        value.detach().requires_grad_(wants) if wants else value
        for value, wants in zip(values, is_wanted, strict=True)
    ]
    trained = [leaf for leaf, wants in zip(leaves, is_wanted, strict=True) if wants]
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = [torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32)) for leaf in trained]
    tensors = dict(zip(ctx.names, leaves, strict=True))
    for rows, weight_gradient in tiled.weight_gradient_tiles(grad, x, multiple=ctx.n_rows[1]):
        with torch.enable_grad():
            tile = ctx.dequantize_rows(tensors, rows, wide)
        parts = torch.autograd.grad(tile, trained, weight_gradient.to(tile.dtype), allow_unused=True)
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part
    found = iter(sums)
    return [next(found).to(value.dtype) if wants else None for value, wants in zip(values, is_wanted, strict=True)]
