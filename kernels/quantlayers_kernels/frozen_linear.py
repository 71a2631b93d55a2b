"""Frozen linear layers and their LoRA branches as one autograd function, for all layers that read the same input.

Composed of modules, such a layer saves its input several times for the backward pass: cast to the adapter's dtype,
and once more with dropout. Here the input itself is saved, once for all layers, with its products with each ``A`` and
one boolean per number for dropout. The layers' ``A`` are multiplied together, and each layer's part of the input's
gradient is added in place where it is computed; autograd would allocate each part and add them in passes over all of
it.

The hidden state lies transposed, (r, n_tokens): on a CPU a product with few rows takes a half to a ninth of the time
of one with few columns. Without gradients nothing of this is needed: see ``branch_products.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tiled
from .branch_products import (
    Branch,
    add_branches,
    add_product,
    coin_flips,
    dropped,
    dtype_of_branches,
    rows_of,
    upright,
    without_autocast,
)
from .precision import product_dtype
from .tiled import WeightTiles


class FrozenLinear(NamedTuple):
    """``x @ weight.T + bias`` with a weight that takes no gradient, and the branches that are added to it.

    Fields:
        multiply: x (..., in_features) to (..., out_features), bias included, contiguous and in memory of its own. Its
            result takes no gradient.
        tiles: the weight in tiles of a dtype.
        dtype: of the product.
        bias: (out_features,), for its gradient, or None.
        branches: low-rank adapter branches to add.
    """

    multiply: Callable[[Tensor], Tensor]
    tiles: Callable[[torch.dtype], WeightTiles]
    dtype: torch.dtype
    bias: Tensor | None
    branches: Sequence[Branch]


def lora_linears(x: Tensor, layers: Sequence[FrozenLinear]) -> tuple[Tensor, ...]:
    """The results of ``layers``, each with its branches; once differentiable in ``x``, biases, ``A`` and ``B``.

    Args:
        x: (..., in_features), floating.
        layers: of the same ``dtype``, and all factors of the same dtype too. The branches' products run in that of
            the factors, or of autocast where it is on; see :func:`product_dtype` for halves on a CPU.

    Returns:
        (..., out_features) of each layer, as its ``multiply`` gives it.
    """
    places = _places(layers)
    floats = [layer.bias for layer in layers]
    for place in places:
        floats += place.branch.A, place.branch.B
    if not torch.is_grad_enabled() or not (x.requires_grad or any(f is not None and f.requires_grad for f in floats)):
        return _without_gradients(x, layers, places)
    dtype = dtype_of_branches(x, [place.branch for place in places])
    return _LoraLinears.apply(x, layers, places, dtype, *floats)


def _without_gradients(x: Tensor, layers: Sequence[FrozenLinear], places: "list[_Place]") -> tuple[Tensor, ...]:
    if any(place.branch.dropout > 0 for place in places):
        return _results(x, layers, places, dtype_of_branches(x, [place.branch for place in places]))[0]
    return tuple(add_branches(layer.multiply(x), x, layer.branches) for layer in layers)


class _Place(NamedTuple):
    """A branch, the index of its layer, and its rows of the hidden state (sum of all r, n_tokens)."""

    branch: Branch
    layer: int
    ranks: slice


def _places(layers: Sequence[FrozenLinear]) -> list[_Place]:
    places, start = [], 0
    for at, layer in enumerate(layers):
        for branch in layer.branches:
            places.append(_Place(branch, at, slice(start, start + branch.A.shape[0])))
            start += branch.A.shape[0]
    return places


class _Block(NamedTuple):
    """Neighbouring branches that read the same numbers: all without dropout, or one with it.

    Fields:
        branches: their range among all branches.
        ranks: their rows of the hidden state.
        dropout: of each.
    """

    branches: slice
    ranks: slice
    dropout: float


def _blocks(places: Sequence[_Place]) -> list[_Block]:
    blocks: list[_Block] = []
    for i, (branch, _, ranks) in enumerate(places):
        if blocks and blocks[-1].dropout == branch.dropout == 0:
            last = blocks.pop()
            blocks.append(_Block(slice(last.branches.start, i + 1), slice(last.ranks.start, ranks.stop), 0.0))
        else:
            blocks.append(_Block(slice(i, i + 1), ranks, branch.dropout))
    return blocks


def _results(
    x: Tensor, layers: Sequence[FrozenLinear], places: Sequence[_Place], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor, list[_Block], list[Tensor | None]]:
    """The results of :func:`lora_linears`, and for the gradient the hidden state, its blocks and dropout's masks."""
    blocks = _blocks(places)
    with without_autocast(x):
        rows = rows_of(x, dtype)
        masks = [coin_flips(rows, 1 - block.dropout) if block.dropout > 0 else None for block in blocks]
        hidden = rows.new_empty(places[-1].ranks.stop if places else 0, rows.shape[0])
        for block, mask in zip(blocks, masks, strict=True):
            A = _stacked([place.branch.A for place in places[block.branches]], dtype)
            torch.mm(A, dropped(rows, mask, block.dropout).t(), out=hidden[block.ranks])
        results = tuple(layer.multiply(x) for layer in layers)
        for branch, at, ranks in places:
            y = results[at]
            into = y.view(-1, y.shape[-1])
            add_product(into, upright(hidden[ranks]), branch.B.to(dtype).t(), scaling=branch.scaling)
    return results, hidden, blocks, masks


@dataclass
class _BranchGradient:
    """A branch in the backward pass: its saved factors, which of their gradients are wanted, and what is found."""

    place: _Place
    A: Tensor
    B: Tensor
    wants_A: bool
    wants_B: bool
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None


@dataclass
class _LayerGradient:
    """A layer in the backward pass: its branches, the gradient of its result, and that of its bias where wanted."""

    layer: FrozenLinear
    branches: list[_BranchGradient]
    grad: Tensor | None
    wants_bias: bool
    grad_bias: Tensor | None = None


def _gradients(
    layers: Sequence[FrozenLinear],
    places: Sequence[_Place],
    grads: Sequence[Tensor | None],
    floats: Sequence[Tensor],
    wants: Sequence[bool],
) -> list[_LayerGradient]:
    """Records of what the autograd function was given: biases layer by layer, then ``A`` and ``B`` of each branch."""
    factors = iter(zip(floats[len(layers) :], wants[len(layers) :], strict=True))
    branches = []
    for place in places:
        (A, wants_A), (B, wants_B) = next(factors), next(factors)
        branches.append(_BranchGradient(place, A, B, wants_A, wants_B))
    return [
        _LayerGradient(layer, [each for each in branches if each.place.layer == at], grads[at], wants[at])
        for at, layer in enumerate(layers)
    ]


class _LoraLinears(torch.autograd.Function):
    """Takes the biases of all layers, then ``A`` and ``B`` of each branch."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[FrozenLinear], places: list[_Place], dtype: torch.dtype, *floats: Any
    ) -> tuple[Tensor, ...]:
        results, hidden, ctx.blocks, masks = _results(x, layers, places, dtype)
        ctx.save_for_backward(x, hidden, *masks, *floats)
        ctx.layers, ctx.places = layers, places
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, hidden, *saved = ctx.saved_tensors
        masks, floats = saved[: len(ctx.blocks)], saved[len(ctx.blocks) :]
        wants_x, _, _, _, *wants = ctx.needs_input_grad
        layers = _gradients(ctx.layers, ctx.places, grads, floats, wants)
        branches = [branch for layer in layers for branch in layer.branches]
        with without_autocast(x):
            grad_hidden = torch.zeros_like(hidden)
            for layer in layers:
                _add_gradients_of_layer(layer, hidden, grad_hidden)
            grad_x = _input_gradient_of_weights(x, layers) if wants_x else None
            rows = rows_of(x, hidden.dtype)
            for block, mask in zip(ctx.blocks, masks, strict=True):
                its = branches[block.branches]
                _add_gradients_of_block(block, its, mask, rows, grad_hidden[block.ranks], grad_x, grads)
        grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        of_factors = (grad for branch in branches for grad in (branch.grad_A, branch.grad_B))
        return grad_x, None, None, None, *(layer.grad_bias for layer in layers), *of_factors


def _add_gradients_of_layer(layer: _LayerGradient, hidden: Tensor, grad_hidden: Tensor) -> None:
    """Gradients of a layer's bias, of its ``B`` and of its rows of the hidden state."""
    if layer.grad is None:  # the result was not used
        return
    dtype = hidden.dtype
    rows = rows_of(layer.grad, dtype)
    for each in layer.branches:
        ranks, scaling = each.place.ranks, each.place.branch.scaling
        torch.mm((each.B.to(dtype) * scaling).t(), rows.t(), out=grad_hidden[ranks])
        if each.wants_B:
            each.grad_B = (hidden[ranks] @ rows).mul_(scaling).t().to(each.B.dtype)
    if layer.wants_bias and layer.layer.bias is not None:
        layer.grad_bias = tiled.bias_gradient(layer.grad, layer.layer.bias.dtype)


def _input_gradient_of_weights(x: Tensor, layers: Sequence[_LayerGradient]) -> Tensor | None:
    """Sum over the layers of ``grad @ weight``, (n_tokens, in_features); None if no result was used."""
    used = [(layer.layer, layer.grad) for layer in layers if layer.grad is not None]
    dtype = product_dtype(layers[0].layer.dtype, x.device)
    total: Tensor | None = None
    for layer, grad in used:
        rows, is_first = rows_of(grad, dtype), total is None
        if total is None:
            total = tiled.empty_input_gradient(rows, x.shape[-1], sum(grad.shape[-1] for _, grad in used))
        tiled.add_input_gradient(rows, layer.tiles(dtype), total, is_first=is_first)
    return total


def _add_gradients_of_block(
    block: _Block,
    branches: Sequence[_BranchGradient],
    mask: Tensor | None,
    rows: Tensor,
    grad_hidden: Tensor,
    grad_x: Tensor | None,
    grads: Sequence[Tensor | None],
) -> None:
    """Gradients of a block's ``A``, and its part of the input's gradient, which is added to ``grad_x``."""
    if any(each.wants_A for each in branches):
        pieces = (grad_hidden @ dropped(rows, mask, block.dropout)).split([len(each.A) for each in branches])
        for each, piece in zip(branches, pieces, strict=True):
            if each.wants_A and grads[each.place.layer] is not None:
                each.grad_A = piece.to(each.A.dtype)
    if grad_x is None:
        return
    A = _stacked([each.A for each in branches], rows.dtype)
    if mask is None:
        add_product(grad_x, grad_hidden.t(), A)
    else:
        grad_x.add_(dropped(grad_hidden.t() @ A, mask, block.dropout))


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).to(dtype)
