"""All experts of a frozen stack and their LoRA branches as one autograd function, for tokens sorted by expert.

One node for a stack, instead of one for each expert: gradients of the factors are written into one tensor for all
experts, and the products of the weights may be one call for all of them too. As in ``frozen_linear.py`` the input is
saved once, as it came, with its products with each ``A`` and one boolean per number for dropout.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .branch_products import Branch, add_product, coin_flips, dropped, dtype_of_branches, without_autocast


class FrozenExperts(NamedTuple):
    """The weights of a stack, which take no gradient.

    Fields:
        multiply: (n_tokens, in_features) to (n_tokens, out_features), in memory of its own; each token with the
            weight of its expert.
        input_gradient: (n_tokens, out_features) to (n_tokens, in_features): the gradient of that product.
        counts: tokens of each expert, in their order.
    """

    multiply: Callable[[Tensor], Tensor]
    input_gradient: Callable[[Tensor], Tensor]
    counts: Sequence[int]


def expert_rows(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Each expert that has tokens, and their rows among the sorted tokens; ``counts`` are those of all experts."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def lora_experts(x: Tensor, experts: FrozenExperts, branches: Sequence[Branch]) -> Tensor:
    """The results of ``experts`` with their branches; once differentiable in ``x`` and all factors.

    Args:
        x: (n_tokens, in_features), floating, sorted by expert.
        experts: the stack.
        branches: with ``A`` (n_experts, r, in_features) and ``B`` (n_experts, out_features, r). Each is multiplied
            in the dtype of its factors, or of autocast where it is on.

    Returns:
        (n_tokens, out_features), as ``experts.multiply`` gives it.
    """
    dtypes = [dtype_of_branches(x, [branch]) for branch in branches]
    factors = [factor for branch in branches for factor in (branch.A, branch.B)]
    return _LoraExperts.apply(x, experts, branches, dtypes, *factors)


class _LoraExperts(torch.autograd.Function):
    """Takes ``A`` and ``B`` of each branch last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        experts: FrozenExperts,
        branches: Sequence[Branch],
        dtypes: Sequence[torch.dtype],
        *factors: Tensor,
    ) -> Tensor:
        with without_autocast(x):
            y = experts.multiply(x)
            hiddens, masks = [], []
            for branch, dtype in zip(branches, dtypes, strict=True):
                mask = coin_flips(x, 1 - branch.dropout) if branch.dropout > 0 else None
                hidden = x.new_empty(branch.A.shape[1], len(x), dtype=dtype)
                for expert, rows in expert_rows(experts.counts):
                    inputs = dropped(x[rows].to(dtype), _rows(mask, rows), branch.dropout)
                    its = torch.mm(branch.A[expert].to(dtype), inputs.t())
                    hidden[:, rows] = its
                    add_product(y[rows], its.t(), branch.B[expert].to(dtype).t(), scaling=branch.scaling)
                hiddens.append(hidden)
                masks.append(mask)
        ctx.save_for_backward(x, *hiddens, *masks, *factors)
        ctx.experts, ctx.traits = experts, [(branch.scaling, branch.dropout) for branch in branches]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        n = len(ctx.traits)
        hiddens, masks, factors = saved[:n], saved[n : 2 * n], saved[2 * n :]
        wants_x, _, _, _, *wants = ctx.needs_input_grad
        with without_autocast(x):
            grad_x = ctx.experts.input_gradient(grad) if wants_x else None
            found: list[Tensor | None] = []
            for i, (scaling, dropout) in enumerate(ctx.traits):
                branch = Branch(factors[2 * i], factors[2 * i + 1], scaling, dropout)
                wanted = wants[2 * i], wants[2 * i + 1]
                found += _add_branch_gradients(ctx.experts, branch, wanted, x, hiddens[i], masks[i], grad, grad_x)
        return grad_x, None, None, None, *found


def _add_branch_gradients(
    experts: FrozenExperts,
    branch: Branch,
    wanted: tuple[bool, bool],
    x: Tensor,
    hidden: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    grad_x: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of a branch's ``A`` and ``B``; its part of the input's is added to ``grad_x``."""
    dtype = hidden.dtype
    A, B, scaling, dropout = branch
    grad_A, grad_B = (torch.zeros_like(each) if wants else None for each, wants in zip((A, B), wanted, strict=True))
    for expert, rows in expert_rows(experts.counts):
        of_result = grad[rows].to(dtype)
        if grad_B is not None:
            grad_B[expert] = (hidden[:, rows] @ of_result).mul_(scaling).t()
        if grad_A is None and grad_x is None:
            continue
        of_hidden = (B[expert].to(dtype).t() @ of_result.t()).mul_(scaling)  # (r, n)
        its_mask = _rows(mask, rows)
        if grad_A is not None:
            grad_A[expert] = of_hidden @ dropped(x[rows].to(dtype), its_mask, dropout)
        if grad_x is None:
            continue
        if its_mask is None:
            add_product(grad_x[rows], of_hidden.t(), A[expert].to(dtype))
        else:
            grad_x[rows] += dropped(of_hidden.t() @ A[expert].to(dtype), its_mask, dropout)
    return grad_A, grad_B


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return None if mask is None else mask[rows]
