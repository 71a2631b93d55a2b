"""Frozen linear layers and their LoRA branches as one autograd function, for all layers that read the same input.

Composed of modules such a layer keeps its input several times: cast to the adapter's dtype, and once more with
dropout. Here it is the input itself, once for all layers, its products with each ``A``, and a boolean for each
dropped number. The layers' ``A`` are multiplied together, and what each layer gives to the input's gradient is added
up where it is computed; autograd would write each to memory of its own, and add them in passes over all of it.

The hidden state lies transposed, (r, n_tokens): on a CPU a product with few rows takes a half to a ninth of the time
of one with few columns.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import tiled
from .precision import product_dtype
from .tiled import WeightTiles


class Branch(NamedTuple):
    """``scaling * dropout(x) @ A.T @ B.T``.

    Fields:
        A: (r, in_features), floating.
        B: (out_features, r), dtype of ``A``.
        scaling: of the branch.
        dropout: probability that a number of ``x`` counts as zero; the others grow by ``1 / (1 - dropout)``.
    """

    A: Tensor
    B: Tensor
    scaling: float
    dropout: float = 0.0


class FrozenLinear(NamedTuple):
    """``x @ weight.T + bias`` with a weight that takes no gradient, and the branches that are added to it.

    Fields:
        multiply: x (..., in_features) to (..., out_features), contiguous and in memory of its own, bias included. No
            gradient is asked of it.
        tiles: the weight in tiles of a dtype.
        dtype: of the product.
        bias: (out_features,), for its gradient, or None.
        branches: what is added.
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
    branches = [branch for layer in layers for branch in layer.branches]
    dtype = branches[0].A.dtype if branches else x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    dtype = product_dtype(dtype, x.device)
    if not torch.is_grad_enabled():
        return _results(x, layers, branches, dtype)[0]
    return _LoraLinears.apply(
        x,
        layers,
        branches,
        dtype,
        *(layer.bias for layer in layers),
        *(branch.A for branch in branches),
        *(branch.B for branch in branches),
    )


class _Block(NamedTuple):
    """Branches that read the very same numbers: those without dropout together, each other one alone.

    Fields:
        branches: which.
        ranks: their rows of the hidden state.
        dropout: theirs.
    """

    branches: slice
    ranks: slice
    dropout: float


def _blocks(branches: Sequence[Branch], ranks: Sequence[slice]) -> list[_Block]:
    blocks: list[_Block] = []
    for i, (branch, part) in enumerate(zip(branches, ranks, strict=True)):
        if blocks and blocks[-1].dropout == branch.dropout == 0:
            last = blocks.pop()
            blocks.append(_Block(slice(last.branches.start, i + 1), slice(last.ranks.start, part.stop), 0.0))
        else:
            blocks.append(_Block(slice(i, i + 1), part, branch.dropout))
    return blocks


def _ranks(branches: Sequence[Branch]) -> list[slice]:
    """Where each branch lies in the hidden state (sum of all r, n_tokens)."""
    ends = list(accumulate((branch.A.shape[0] for branch in branches), initial=0))
    return [slice(start, stop) for start, stop in pairwise(ends)]


def _results(
    x: Tensor, layers: Sequence[FrozenLinear], branches: list[Branch], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], Tensor, list[_Block], list[Tensor | None]]:
    """What :func:`lora_linears` gives, and for its gradient the hidden state and what dropout has kept."""
    ranks = _ranks(branches)
    blocks = _blocks(branches, ranks)
    with _without_autocast(x):
        rows = _rows(x, dtype)
        kept = [_coin_flips(rows, 1 - block.dropout) if block.dropout > 0 else None for block in blocks]
        hidden = rows.new_empty(ranks[-1].stop if ranks else 0, rows.shape[0])
        for block, mask in zip(blocks, kept, strict=True):
            A = _stacked([branch.A for branch in branches[block.branches]], dtype)
            torch.mm(A, _dropped(rows, mask, block.dropout).t(), out=hidden[block.ranks])
        results, places = [], iter(ranks)
        for layer in layers:
            y = layer.multiply(x)
            flat = y.view(-1, y.shape[-1])
            for branch in layer.branches:
                _add_product(flat, hidden[next(places)].t(), branch.B.to(dtype).t(), scaling=branch.scaling)
            results.append(y)
    return tuple(results), hidden, blocks, kept


class _LoraLinears(torch.autograd.Function):
    """Takes the biases of all layers, then ``A`` and then ``B`` of all branches, layer by layer."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layers: Sequence[FrozenLinear], branches: list[Branch], dtype: torch.dtype, *floats: Any
    ) -> tuple[Tensor, ...]:
        results, hidden, ctx.blocks, kept = _results(x, layers, branches, dtype)
        ctx.save_for_backward(x, hidden, *kept, *floats)
        ctx.layers = layers
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layers, blocks = ctx.layers, ctx.blocks
        branches = [(at, branch) for at, layer in enumerate(layers) for branch in layer.branches]
        ranks = _ranks([branch for _, branch in branches])
        ends = (len(layers), len(layers) + len(branches))
        x, hidden, *saved = ctx.saved_tensors
        kept, floats = saved[: len(blocks)], saved[len(blocks) :]
        biases, As, Bs = floats[: ends[0]], floats[ends[0] : ends[1]], floats[ends[1] :]
        wants_x, wants = ctx.needs_input_grad[0], ctx.needs_input_grad[4:]
        wants_bias, wants_A, wants_B = wants[: ends[0]], wants[ends[0] : ends[1]], wants[ends[1] :]
        grad_biases: list[Tensor | None] = [None] * len(biases)
        grad_As: list[Tensor | None] = [None] * len(As)
        grad_Bs: list[Tensor | None] = [None] * len(Bs)

        dtype, base_dtype = hidden.dtype, product_dtype(layers[0].dtype, x.device)
        grad_hidden = torch.zeros_like(hidden)
        grad_x: Tensor | None = None
        with _without_autocast(x):
            for at, (layer, bias, grad) in enumerate(zip(layers, biases, grads, strict=True)):
                if grad is None:  # nobody used this result
                    continue
                rows = _rows(grad, dtype)
                for i in (i for i, (owner, _) in enumerate(branches) if owner == at):
                    scaling = branches[i][1].scaling
                    torch.mm((Bs[i].to(dtype) * scaling).t(), rows.t(), out=grad_hidden[ranks[i]])
                    if wants_B[i]:
                        grad_Bs[i] = (hidden[ranks[i]] @ rows).mul_(scaling).t().to(Bs[i].dtype)
                if wants_bias[at]:
                    grad_biases[at] = tiled.bias_gradient(grad, bias.dtype)
                if wants_x:
                    is_first, rows = grad_x is None, _rows(grad, base_dtype)
                    if grad_x is None:
                        n_summed = sum(each.shape[-1] for each in grads if each is not None)
                        grad_x = tiled.empty_input_gradient(rows, x.shape[-1], n_summed)
                    tiled.add_input_gradient(rows, layer.tiles(base_dtype), grad_x, is_first=is_first)
            rows = _rows(x, dtype)
            for block, mask in zip(blocks, kept, strict=True):
                part, its = grad_hidden[block.ranks], As[block.branches]
                if any(wants_A[block.branches]):
                    pieces = (part @ _dropped(rows, mask, block.dropout)).split([len(A) for A in its])
                    for i, piece in enumerate(pieces, start=block.branches.start):
                        if wants_A[i] and grads[branches[i][0]] is not None:
                            grad_As[i] = piece.to(As[i].dtype)
                if grad_x is not None and mask is None:
                    _add_product(grad_x, part.t(), _stacked(its, dtype))
                elif grad_x is not None:
                    grad_x.add_(_dropped(part.t() @ _stacked(its, dtype), mask, block.dropout))
        grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
        return grad_x, None, None, None, *grad_biases, *grad_As, *grad_Bs


def _without_autocast(x: Tensor) -> AbstractContextManager:
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _stacked(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(tuple(parts))).to(dtype)


def _add_product(into: Tensor, left: Tensor, right: Tensor, *, scaling: float = 1.0) -> None:
    """``into += scaling * left @ right``, whatever the dtype of ``into``."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scaling)
    else:
        into.add_(left @ right, alpha=scaling)


def _coin_flips(rows: Tensor, probability: float) -> Tensor:
    return torch.empty(rows.shape, dtype=torch.bool, device=rows.device).bernoulli_(probability)


def _dropped(rows: Tensor, kept: Tensor | None, dropout: float) -> Tensor:
    if kept is None:
        return rows
    return rows * kept * (1 / (1 - dropout) if dropout < 1 else 0.0)
