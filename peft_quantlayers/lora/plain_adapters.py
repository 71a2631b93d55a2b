"""Adapters that are two plain matrices, so that products with their weights are all that they compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from quantlayers_kernels.frozen_linear import Branch

from ..layers.linear import is_watched


def plain_branches(layer: LoraLinear, names: Sequence[str], x: Tensor) -> list[Branch] | None:
    """The adapters ``names`` of ``layer`` as matrices, for the input ``x``; None where one of them is more than that.

    All are of one dtype, and on the device of ``x``.
    """
    if not all(_is_plain(layer, name) for name in names):
        return None
    branches = [_branch(layer, name) for name in names]
    if len({branch.A.dtype for branch in branches}) > 1:
        return None
    if any(factor.device != x.device for branch in branches for factor in (branch.A, branch.B)):
        return None
    return branches


def is_plain_input(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with numbers, outside of compilers and functorch transforms."""
    return (
        type(x) in (Tensor, nn.Parameter)  # no fake tensors, shards, ...
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _is_plain(layer: Any, name: str) -> bool:
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    return (
        name not in layer.lora_variant
        and type(A) is type(B) is nn.Linear
        and A.bias is B.bias is None
        # Wrappers that shard or gather a module's weight work through hooks, or replace its Parameter.
        and type(A.weight) is type(B.weight) is nn.Parameter
        and A.weight.dtype == B.weight.dtype
        and type(dropout) in (nn.Identity, nn.Dropout)
        and not (is_watched(A) or is_watched(B) or is_watched(dropout))
        and getattr(layer, "cast_input_dtype_enabled", True)
    )


def _branch(layer: Any, name: str) -> Branch:
    A, B = (cast(nn.Linear, part[name]).weight for part in (layer.lora_A, layer.lora_B))
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Branch(A=A, B=B, scaling=layer.scaling[name], dropout=p)
