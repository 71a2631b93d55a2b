"""What one forward pass shows of a model's structure: which modules read which norm layer's output, and their order.

A module reads a norm layer if it is called with that layer's output, reshaped or not: what counts is the memory, so
that a changed copy of the output is no longer it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call, evaluating
from ..layers.dense_types import dense_type_of
from ..layers.expert_types import fused_weights
from ..layers.norms import is_norm


@dataclass(eq=False)
class Recorded:
    """What one pass showed.

    Fields:
        readers: of each norm layer that ran, the names of the modules, and of fused weights, that read its output.
        layers: names of all dense layers, fused weights and embeddings that ran, in the order of their first run.
        ambiguous: readers that in this pass read something else too.
    """

    readers: dict[str, list[str]] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    ambiguous: set[str] = field(default_factory=set)


@torch.no_grad()
def record_reads(model: nn.Module, call: Call) -> Recorded:
    """Run ``model`` once, and see what reads what."""
    found = Recorded()
    held: dict[int, tuple[str, Tensor]] = {}  # the tensors too, so that no other takes their place in memory

    def norm_hook(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if isinstance(output, Tensor):
                held[output.untyped_storage().data_ptr()] = (name, output)
                found.readers.setdefault(name, [])

        return hook

    def read_hook(names: list[str]) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            sources = {
                held[pointer][0]
                for value in tensors
                if (pointer := value.untyped_storage().data_ptr()) in held
                and value.shape[-1:] == held[pointer][1].shape[-1:]
            }
            for name in names:
                if name not in found.layers:
                    found.layers.append(name)
                known = {norm for norm, readers in found.readers.items() if name in readers}
                if (known or name in seen) and known != sources:
                    found.ambiguous.add(name)
                seen.add(name)
                for source in sources:
                    if name not in found.readers[source]:
                        found.readers[source].append(name)

        return hook

    seen: set[str] = set()
    with ExitStack() as stack, evaluating(model):
        for name, module in model.named_modules():
            if is_norm(module):
                stack.callback(module.register_forward_hook(norm_hook(name)).remove)
            elif names := _read_weights(name, module):
                stack.callback(module.register_forward_pre_hook(read_hook(names), with_kwargs=True).remove)
        call.run(model)
    return found


def _read_weights(name: str, module: nn.Module) -> list[str]:
    """Names under which the weights of ``module`` are known here; [] of a container.

    That of experts is the first of their fused weights: the others read what the experts have made of the input. A
    router holds a weight (n_experts, in_features) without being a linear layer.
    """
    if fused := fused_weights(module):
        return [f"{name}.{fused[0].parameter}"]
    if dense_type_of(module) is not None:
        return [name]
    weight = module._parameters.get("weight")
    return [name] if weight is not None and weight.dim() == 2 else []
