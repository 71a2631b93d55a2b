"""Which modules of a model stay dense whatever the method and the shapes.

What transformers declares is asked: output embeddings, tied weights, the body of a model with a head. What it does
not declare is told by place and shape: gates beside experts, a handful of outputs.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .dense_types import dense_type_of
from .expert_types import FusedWeight


@dataclass(frozen=True, kw_only=True)
class StaysDense:
    """Why a module is not quantized: ``reason``, one of the constants of this file, and what more there is to say."""

    reason: str
    detail: str = ""


HEAD = "output head"
SKIPPED = "skip_modules"
SHARED = "weight shared with another module"
ROUTER = "router of experts"
FEW_OUTPUTS = "a handful of outputs"
MISFIT = "shape does not fit"

# Gates of one output, classifiers of two: nothing is saved by quantizing them, and much hangs on each.
_HANDFUL = 8


class DenseRules:
    """Why single modules of ``model`` stay dense: what the model says about itself."""

    def __init__(self, model: nn.Module, *, quantize_lm_head: bool = False) -> None:
        self.heads = set(_head_modules(model))
        self._are_heads_dense = not quantize_lm_head
        self._shared = _shared_parameters(model)
        self._tied = _tied_weights(model)
        self._with_experts = {
            name
            for name, module in model.named_modules()
            if any("experts" in child for child, _ in module.named_children())
        }

    def reason(self, name: str, module: nn.Module) -> StaysDense | None:
        """Why ``module``, of a registered type, stays dense; None if nothing of the model is against quantizing it."""
        if name in self.heads and self._are_heads_dense:
            return StaysDense(reason=HEAD)
        if id(module.weight) in self._shared or name in self._tied:
            return StaysDense(reason=SHARED)
        if self.is_router(name):
            return StaysDense(reason=ROUTER)
        n_outputs = _n_outputs(module)
        if n_outputs <= _HANDFUL:
            return StaysDense(reason=FEW_OUTPUTS, detail=f"{n_outputs} output(s)")
        return None

    def reason_of_fused(self, name: str, module: nn.Module, entry: FusedWeight) -> StaysDense | None:
        """Why a fused weight of experts stays dense; None if nothing of the model is against quantizing it."""
        n_outputs = entry.shape(module)[1]
        if id(getattr(module, entry.parameter)) in self._shared or name in self._tied:
            return StaysDense(reason=SHARED)
        return StaysDense(reason=FEW_OUTPUTS, detail=f"{n_outputs} output(s)") if n_outputs <= _HANDFUL else None

    def is_router(self, name: str) -> bool:
        """Whether a module, or one that holds it, is called a router, or is a gate beside experts."""
        parts = name.split(".")
        gates = [part for end, part in enumerate(parts) if ".".join(parts[:end]) in self._with_experts]
        return any("router" in part for part in parts) or any(re.search(r"(^|_)gate$", part) for part in gates)


def _n_outputs(module: nn.Module) -> int:
    entry = dense_type_of(module)
    return _HANDFUL + 1 if entry is None else entry.shape(module)[-2:][0]


def _head_modules(model: nn.Module) -> Iterator[str]:
    """Dense modules that make the outputs of a transformers model, or of one inside it: the heads of any task."""
    declared = declared_embeddings(model, "get_output_embeddings")
    heads = {id(module) for found in declared for module in found.modules()}
    for owner in model.modules():
        if owner is model or _is_of_a_task(owner):
            heads |= {id(module) for module in _outside_body(owner)}
    for name, module in model.named_modules():
        if id(module) in heads and dense_type_of(module) is not None:
            yield name


def _is_of_a_task(module: nn.Module) -> bool:
    """Whether a module is a transformers model with a head, by the name of its class."""
    return hasattr(module, "base_model_prefix") and re.search("For[A-Z]|Head", type(module).__name__) is not None


def _outside_body(owner: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model that are no part of its body.

    A task's class that does not say which of its parts is the body has its heads beside it.
    """
    prefix: Any = getattr(owner, "base_model_prefix", "")
    body = getattr(owner, prefix, None) if prefix else None
    if isinstance(body, nn.Module):
        inside = set(body.modules())
        yield from (module for module in owner.modules() if module not in inside)
    elif "For" in type(owner).__name__:
        yield from owner.children()


def declared_embeddings(model: nn.Module, getter: str) -> Iterator[nn.Module]:
    """The embeddings of ``model`` and of all models inside it, as they declare them; some are several modules in one.

    ``getter``: ``"get_input_embeddings"`` or ``"get_output_embeddings"``.
    """
    for module in model.modules():
        declared: Any = getattr(module, getter, None)
        if not callable(declared):
            continue
        try:
            found = declared()
        except (NotImplementedError, AttributeError):  # of a model that has none
            continue
        if isinstance(found, nn.Module):
            yield found


def _tied_weights(model: nn.Module) -> set[str]:
    """Names of the modules, and of fused weights, that are declared as tied, whether they have been tied or not."""
    tied: Any = getattr(model, "all_tied_weights_keys", None)
    names = {*tied.keys(), *tied.values()} if isinstance(tied, dict) else set()
    return {name.removesuffix(".weight") for name in names}


def _shared_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters that the model holds in more than one place: tied embeddings, a module with two names."""
    owners: dict[int, int] = {}
    for parent in model.modules():
        for module in filter(None, parent._modules.values()):
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {parameter for parameter, count in owners.items() if count > 1}
