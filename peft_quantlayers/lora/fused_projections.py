"""Experimental: LoRA layers that read the same input, computed together when the first of them is called."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from quantlayers_kernels.frozen_linear import FrozenLinear, lora_linears

from ..arguments import check_model
from .layer import LoraQuantizedLinear

logger = logging.getLogger(__name__)

# Names of neighbouring layers that read the same input in the models of transformers.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# Parts of the names of attention modules whose keys and values read an encoder's states.
CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")

# One unused result may come from an interrupted pass; a second one does not.
WASTED_BEFORE_WARNING = 2


def fuse_projections(
    model: nn.Module, groups: Iterable[Sequence[str]] = PROJECTIONS, *, skip: Iterable[str] = CROSS_ATTENTION
) -> list[tuple[str, ...]]:
    """Compute layers that read the same input together in training: q, k and v, gate and up. Experimental.

    On a CPU its gain is within the noise of a training step, and it has not been measured on a GPU. It may change or
    be removed once it has.

    The model and the names of its modules do not change. The first layer of a group that is called computes the
    results of all with one autograd function; the others return theirs. Results are the same up to rounding, and up
    to the order in which dropout draws. All results of a group need one backward pass. A layer is computed alone, as
    before, if its adapter is not plain LoRA, is merged or disabled, if the layer is called with another input or in
    compiled code, or if no gradients are needed. Copies of the model are not fused.

    Args:
        model: a PEFT model, or a transformers model with adapters, on quantized layers.
        groups: names of neighbouring layers that share their input, by default those of transformers. Replaces what
            an earlier call has fused; ``()`` fuses nothing.
        skip: parts of names of modules to leave out, by default those of attention to an encoder.

    Returns:
        Names of the modules in each group that was found.

    Raises:
        ValueError: no layer of ours with LoRA in the model.
        TypeError: ``model`` is not a module, or a string where several are wanted.
    """
    check_model("fuse_projections", model)
    groups = _several(groups, "groups", 'groups=[("q_proj", "k_proj")]')
    groups = [_several_names(group, "groups", 'groups=[("q_proj", "k_proj")]') for group in groups]
    skip = _several_names(skip, "skip", 'skip=["encoder_attn"]')
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraQuantizedLinear)}
    if not layers:
        raise ValueError(
            "the model has no LoRA adapter on a quantized layer, so nothing can be fused. Call get_peft_model first."
        )
    for layer in layers.values():
        layer.shared_input = None
    found: list[tuple[str, ...]] = []
    waste = _Waste()
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for group in groups:
            names = [f"{parent}.{name}".lstrip(".") for name in group]
            names = [name for name in names if name in layers and not any(part in name for part in skip)]
            names = [name for name in names if layers[name].shared_input is None]
            if len(names) > 1 and len({layers[name].in_features for name in names}) == 1:
                shared = SharedInput([layers[name] for name in names], names, waste)
                for name in names:
                    layers[name].shared_input = shared
                found.append(tuple(names))
    if found:
        _warn_that_it_is_experimental()
    elif groups:
        logger.warning("nothing was fused: no neighbours with LoRA are named like one of %s.", groups)
    return found


@cache
def _warn_that_it_is_experimental() -> None:
    logger.warning(
        "fuse_projections is experimental: its gain is within the noise of a training step on a CPU and has not been "
        "measured on a GPU, and it may change or be removed. Measure your own step with and without it."
    )


def _several(given: Iterable[Any], name: str, example: str) -> list[Any]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"fuse_projections: {name} must be several names, such as {example}, got {given!r}.")
    return list(given)


def _several_names(given: Iterable[Any], name: str, example: str) -> list[str]:
    names = _several(given, name, example)
    if not all(isinstance(each, str) for each in names):
        raise TypeError(f"fuse_projections: {name} must be several names, such as {example}, got {names!r}.")
    return names


class _Waste:
    """How often the groups of a model computed results that were not used."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, names: Sequence[str]) -> None:
        self.n += 1
        if self.n == WASTED_BEFORE_WARNING:
            parent = names[0].rpartition(".")[0]
            logger.warning(
                "%s are fused, but the results of some were computed and never used: these layers do not all read "
                "the same input. If that is always the case, leave out such layers, these and others: "
                "fuse_projections(model, skip=[%r, ...]).",
                ", ".join(names),
                parent.rpartition(".")[2] or parent,
            )


@dataclass(frozen=True, kw_only=True)
class _Waiting:
    """What was computed for layers that have not been called yet.

    Fields:
        group: whose layers they are.
        x: the input, if it is still there.
        version: of the input's values.
        results: by layer, with the state that they were computed in.
    """

    group: SharedInput
    x: weakref.ref[Tensor]
    version: int
    results: dict[int, tuple[Any, Tensor]]


class _Pending(threading.local):
    """One group at a time: results hold their graph, and a pass that fails must not leave one in every layer."""

    waiting: _Waiting | None = None


_PENDING = _Pending()


class SharedInput:
    """Layers that are computed together. Copies of it are None, since it names layers and not their copies."""

    def __init__(self, layers: Sequence[LoraQuantizedLinear], names: Sequence[str], waste: _Waste) -> None:
        self.names = tuple(names)
        self._layers = tuple(weakref.ref(layer) for layer in layers)
        self._waste = waste

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, layer: LoraQuantizedLinear, x: Tensor, frozen: FrozenLinear) -> Tensor:
        """The result of ``layer``, whose :meth:`fused_inputs` is ``frozen``; the first call computes those of all."""
        y = self._found(layer, x, frozen)
        if y is not None:
            return y
        layers = [ref() for ref in self._layers]
        # Inference tensors have no version that would show a write.
        if x.is_inference() or not _is_worth_it(frozen) or not any(each is layer for each in layers):
            return lora_linears(x, [frozen])[0]
        members = {layer: frozen}
        for other in layers:
            if other is not None and other is not layer:
                its = other.fused_inputs(x)
                if its is not None and _kind(its) == _kind(frozen):
                    members[other] = its
        results = dict(zip(members, lora_linears(x, list(members.values())), strict=True))
        y = results.pop(layer)
        _PENDING.waiting = _Waiting(
            group=self,
            x=weakref.ref(x),
            version=x._version,
            results={id(each): (_state_of(each, members[each]), its) for each, its in results.items()},
        )
        return y

    def _found(self, layer: LoraQuantizedLinear, x: Tensor, frozen: FrozenLinear) -> Tensor | None:
        """The result computed for ``layer`` earlier, if nothing has changed since; unusable results are dropped."""
        waiting = _PENDING.waiting
        if waiting is None:
            return None
        if waiting.group is self and waiting.x() is x and waiting.version == x._version:
            state, y = waiting.results.pop(id(layer), (None, None))
            if not waiting.results:
                _PENDING.waiting = None
            if state == _state_of(layer, frozen):
                return y
        _PENDING.waiting = None
        if waiting.results:
            waiting.group._waste.add(waiting.group.names)
        return None


def _is_worth_it(frozen: FrozenLinear) -> bool:
    """Whether to compute all: if gradients are needed, or if dropout draws.

    A checkpoint's first pass may take no gradients, and its second must draw the same numbers in the same order.
    """
    return torch.is_grad_enabled() or any(branch.dropout > 0 for branch in frozen.branches)


def _kind(frozen: FrozenLinear) -> tuple[torch.dtype, torch.dtype]:
    """What layers that are computed together have in common."""
    return frozen.dtype, frozen.branches[0].A.dtype


def _state_of(layer: LoraQuantizedLinear, frozen: FrozenLinear) -> tuple[Any, ...]:
    """What the result depends on, besides the input."""
    floats = [factor for branch in frozen.branches for factor in (branch.A, branch.B)]
    floats += [] if frozen.bias is None else [frozen.bias]
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(frozen.branches[0].A.device.type),
        frozen.dtype,
        layer.quantized_base().n_writes,
        *((branch.scaling, branch.dropout) for branch in frozen.branches),
        *((id(part), part.requires_grad, -1 if part.is_inference() else part._version) for part in floats),
    )
