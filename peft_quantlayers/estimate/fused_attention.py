"""Attention on the meta device that keeps for the backward pass what the fused kernels keep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional


@contextmanager
def fused_attention() -> Iterator[None]:
    """In the place of torch's attention, which on the meta device keeps the whole matrix of probabilities.

    Also where autograd calls the model again, in a thread of its own: a mode of torch would not reach there.
    """

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    with patch.object(functional, "scaled_dot_product_attention", attention):
        yield


class _Attention(torch.autograd.Function):
    """Shapes alone: (batch, heads, tokens, head_dim) each, and one float32 number for each head and token."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        log_sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, log_sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
