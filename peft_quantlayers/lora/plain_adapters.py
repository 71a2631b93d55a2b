"""Adapters that are two plain matrices, and compute nothing but the products with them.

This runs for every generated token, so modules are read from their parents' dictionaries: each attribute of a module
costs a call in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from quantlayers_kernels.branch_products import Branch


def plain_branches(layer: Any, names: Sequence[str], x: Tensor) -> list[Branch] | None:
    """The adapters ``names`` of ``layer`` as matrices, for the input ``x``; None if one of them is more than that.

    All are of one dtype, and on the device of ``x``.
    """
    if _has_any_global_hook() or not getattr(layer, "cast_input_dtype_enabled", True):
        return None
    parts = layer._modules
    As, Bs, dropouts = (parts[part]._modules for part in ("lora_A", "lora_B", "lora_dropout"))
    branches: list[Branch] = []
    for name in names:
        A, B, dropout = As[name], Bs[name], dropouts[name]
        if name in layer.lora_variant or not (type(A) is type(B) is nn.Linear):
            return None
        for module in (A, B, dropout):
            if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
                return None
            if module._backward_hooks or module._backward_pre_hooks:
                return None
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout:
            p = dropout.p if dropout.training else 0.0
        else:
            return None
        left, right = B._parameters, A._parameters
        weight_A, weight_B = right["weight"], left["weight"]
        # Wrappers that shard or gather a module's weight work through hooks, or replace its Parameter.
        if not (type(weight_A) is type(weight_B) is nn.Parameter) or right["bias"] is not None:
            return None
        dtype = branches[0].A.dtype if branches else weight_A.dtype
        if left["bias"] is not None or not weight_A.dtype == weight_B.dtype == dtype:
            return None
        if not weight_A.device == weight_B.device == x.device:
            return None
        branches.append(Branch(weight_A, weight_B, layer.scaling[name], p))
    return branches


def is_plain_input(x: Tensor) -> bool:
    """Whether ``x`` is a tensor with values, outside of compilers and functorch transforms."""
    return (
        type(x) in (Tensor, nn.Parameter)  # no fake tensors, shards, ...
        and not x.is_meta
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )
