"""Which parameters hold the weights of all experts of a mixture, fused into one tensor, and how each keeps them.

transformers' own experts classes declare it: ``use_experts_implementation`` sets ``has_gate`` and ``is_transposed`` on
the module. The few classes that do not are entered here by text, so that this file imports no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class FusedWeight:
    """One parameter that holds a stack of weights, one for each expert.

    Fields:
        parameter: its name in the experts module.
        is_transposed: each weight is (in_features, out_features) in it, instead of (out_features, in_features).
    """

    parameter: str
    is_transposed: bool = False

    def shape(self, module: nn.Module) -> tuple[int, int, int]:
        """(n_experts, out_features, in_features) of the parameter in ``module``."""
        n_experts, first, second = cast(Tensor, getattr(module, self.parameter)).shape
        return (n_experts, second, first) if self.is_transposed else (n_experts, first, second)

    def weight(self, module: nn.Module) -> Tensor:
        """All weights as (n_experts, out_features, in_features): the parameter itself, or a view of it."""
        weight: Any = getattr(module, self.parameter)
        weight = weight.weight if isinstance(weight, nn.Module) else weight
        return weight.transpose(1, 2) if self.is_transposed else weight


_UNDECLARED = {
    "transformers.models.llama4.modeling_llama4:Llama4TextExperts": (
        FusedWeight(parameter="gate_up_proj", is_transposed=True),
        FusedWeight(parameter="down_proj", is_transposed=True),
    ),
    "transformers.models.longcat_flash.modeling_longcat_flash:LongcatFlashExperts": (
        FusedWeight(parameter="gate_up_proj"),
        FusedWeight(parameter="down_proj"),
    ),
    "transformers.models.jetmoe.modeling_jetmoe:JetMoeParallelExperts": (FusedWeight(parameter="weight"),),
}


def fused_weights(module: nn.Module) -> tuple[FusedWeight, ...]:
    """The fused weights of an experts module, dense or quantized, as its forward pass uses them; () of any other."""
    cls = type(module)
    entries = _UNDECLARED.get(f"{cls.__module__}:{cls.__qualname__}")
    if entries is not None:
        return entries
    has_gate, is_transposed = (vars(module).get(name) for name in ("has_gate", "is_transposed"))
    if not isinstance(has_gate, bool) or not isinstance(is_transposed, bool):
        return ()
    names = ("gate_up_proj" if has_gate else "up_proj", "down_proj")
    return tuple(FusedWeight(parameter=name, is_transposed=is_transposed) for name in names)


def dense_stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module, FusedWeight]]:
    """Name, experts module and entry of each fused weight in ``model`` that is a dense parameter."""
    for name, module in model.named_modules():
        for entry in fused_weights(module):
            parameter = module._parameters.get(entry.parameter)
            if parameter is not None and parameter.dim() == 3:
                yield f"{name}.{entry.parameter}" if name else entry.parameter, module, entry


def find_stack(model: nn.Module, name: str) -> tuple[nn.Module, FusedWeight] | None:
    """The experts module and the entry of the fused weight ``name`` of ``model``, dense or quantized; or None."""
    parent, _, parameter = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    entry = next((entry for entry in fused_weights(module) if entry.parameter == parameter), None)
    return None if entry is None or getattr(module, parameter, None) is None else (module, entry)


def stack_at(model: nn.Module, name: str) -> tuple[nn.Module, FusedWeight]:
    """:func:`find_stack`; ValueError if there is none."""
    found = find_stack(model, name)
    if found is None:
        raise ValueError(f"{name}: the model has no fused weight of experts of that name.")
    return found
