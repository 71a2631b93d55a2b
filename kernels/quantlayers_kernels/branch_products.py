"""Low-rank branches beside a frozen weight: what one is, and its products without gradients.

:func:`add_branches` is the way without gradients; with them ``frozen_linear.py`` and ``frozen_experts.py`` compose an
autograd function of the same parts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import product_dtype

# The hidden state of up to so many tokens is copied to lie token by token: adding the product with B takes a fifth of
# the time then for two and four tokens, and as long for eight.
MAX_UPRIGHT_TOKENS = 8


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


def add_branches(y: Tensor, x: Tensor, branches: Sequence[Branch]) -> Tensor:
    """``y``, in place, with the products of ``x`` and each branch added: the way without gradients.

    Args:
        y: (..., out_features), floating and contiguous.
        x: (..., in_features), floating.
        branches: as for ``frozen_linear.lora_linears``, without dropout.
    """
    if _can_multiply_vectors(y, x, branches):
        token, into = x.view(-1), y.view(-1)
        for A, B, scaling, _ in branches:
            into.addmv_(B, torch.mv(A, token), alpha=scaling)
        return y
    dtype = dtype_of_branches(x, branches)
    with without_autocast(x):
        rows, into = rows_of(x, dtype), y.view(-1, y.shape[-1])
        for A, B, scaling, _ in branches:
            add_product(into, upright(A.to(dtype) @ rows.t()), B.to(dtype).t(), scaling=scaling)
    return y


def _can_multiply_vectors(y: Tensor, x: Tensor, branches: Sequence[Branch]) -> bool:
    """Whether ``x`` is one token on a CPU, and all floats are as wide: products with a vector take half the time."""
    dtype = x.dtype
    return (
        x.is_cpu
        and dtype in (torch.float32, torch.float64)
        and y.dtype == dtype
        and x.numel() == x.shape[-1]
        and x.is_contiguous()
        and all(branch.A.dtype == dtype for branch in branches)
        and not torch.is_autocast_enabled("cpu")
    )


def upright(hidden: Tensor) -> Tensor:
    """A hidden state (r, n_tokens) as (n_tokens, r), for the product with B."""
    return hidden.t().contiguous() if hidden.shape[1] <= MAX_UPRIGHT_TOKENS else hidden.t()


def dtype_of_branches(x: Tensor, branches: Sequence[Branch]) -> torch.dtype:
    """That the branches' products run in: the factors', or autocast's where it is on."""
    dtype = branches[0].A.dtype if branches else x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return product_dtype(dtype, x.device)


def without_autocast(x: Tensor) -> AbstractContextManager:
    """While it is entered, products on the device of ``x`` run in the dtype of their factors."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` (..., in_features) as (n_tokens, in_features)."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def add_product(into: Tensor, left: Tensor, right: Tensor, *, scaling: float = 1.0) -> None:
    """``into += scaling * left @ right``, whatever the dtype of ``into``."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scaling)
    else:
        into.add_(left @ right, alpha=scaling)


def coin_flips(rows: Tensor, probability: float) -> Tensor:
    """A mask shaped like ``rows``, each True with this probability."""
    return torch.empty(rows.shape, dtype=torch.bool, device=rows.device).bernoulli_(probability)


def dropped(rows: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """``rows`` where ``mask`` says so, grown to the same mean; all of them without a mask."""
    if mask is None:
        return rows
    return rows * mask * (1 / (1 - dropout) if dropout < 1 else 0.0)
