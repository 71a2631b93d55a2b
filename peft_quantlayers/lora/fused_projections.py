"""Experimental: layers that read the same input, computed together when the first of them is called."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from quantlayers_kernels.frozen_linear import FrozenLinear, lora_linears

from ..arguments import check_flag, check_model
from ..layers.linear import QuantizedLinear
from ..layers.shared_product import SharedProduct
from ..layers.shared_results import SharedResults, Waste
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
_WITH_LORA = "LoRA adapter on a quantized layer"
# Parts of the names of attention modules whose keys and values read an encoder's states.
CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")


def fuse_projections(
    model: nn.Module,
    groups: Iterable[Sequence[str]] = PROJECTIONS,
    *,
    skip: Iterable[str] = CROSS_ATTENTION,
    in_inference: bool = False,
) -> list[tuple[str, ...]]:
    """Compute layers that read the same input together: q, k and v, gate and up. Experimental.

    On a CPU its gain is within the noise of a training step, and it has not been measured on a GPU. It may change or
    be removed once it has.

    The model and the names of its modules do not change. The first layer of a group that is called computes the
    results of all layers with LoRA with one autograd function; the others return theirs. Results are the same up to
    rounding, and up to the order in which dropout draws. All results of a group need one backward pass. A layer is
    computed alone, as before, if its adapter is not plain LoRA, is merged or disabled, if the layer is called with
    another input or in compiled code, or if no gradients are needed. Copies of the model are not fused.

    Args:
        model: a PEFT model, or a transformers model with adapters, on quantized layers; ``in_inference`` also one
            without adapters.
        groups: names of neighbouring layers that share their input, by default those of transformers. Replaces what
            an earlier call has fused; ``()`` fuses nothing.
        skip: parts of names of modules to leave out, by default those of attention to an encoder.
        in_inference: also where no gradients are needed, for a few tokens on a CPU: the quantized layers of a group
            in one call of the kernel, with or without LoRA, with the same bits. Not for inference tensors. Writes to
            a layer between the calls of its group are seen if torch counts them (not those through ``.data``). On
            one thread and on two it gains nothing (``docs/inference-speed.md``); more were not measured.

    Returns:
        Names of the modules in each group that was found.

    Raises:
        ValueError: no layer of ours with LoRA in the model; ``in_inference``, none of ours at all.
        TypeError: ``model`` is not a module, or a string where several are wanted.
    """
    check_model("fuse_projections", model)
    check_flag("in_inference", in_inference)
    groups = _several(groups, "groups", 'groups=[("q_proj", "k_proj")]')
    groups = [_several_names(group, "groups", 'groups=[("q_proj", "k_proj")]') for group in groups]
    skip = _several_names(skip, "skip", 'skip=["encoder_attn"]')
    bases = _quantized_layers(model)
    with_lora = {name: module for name, module in model.named_modules() if isinstance(module, LoraQuantizedLinear)}
    if not (bases if in_inference or not groups else with_lora):
        what, way_out = ("quantized layer", "quantize_model") if in_inference else (_WITH_LORA, "get_peft_model")
        raise ValueError(f"the model has no {what}, so nothing can be fused. Call {way_out} first.")
    for layer in with_lora.values():
        layer.shared_input = None
    for base in bases.values():
        base.shared_product = None
    waste = Waste()
    found = _groups(
        bases if in_inference else {name: bases[name] for name in bases if name in with_lora}, groups, skip
    )
    for names in found:
        if in_inference:
            shared_product = SharedProduct([bases[name] for name in names], names, waste)
            for name in names:
                bases[name].shared_product = shared_product
        adapted = [name for name in names if name in with_lora]
        if len(adapted) > 1:
            shared_input = SharedInput([with_lora[name] for name in adapted], adapted, waste)
            for name in adapted:
                with_lora[name].shared_input = shared_input
    if found:
        _warn_that_it_is_experimental()
    elif groups:
        logger.warning("nothing was fused: no neighbouring layers are named like one of %s.", groups)
    return found


def _groups(
    layers: Mapping[str, QuantizedLinear], groups: Sequence[Sequence[str]], skip: Sequence[str]
) -> list[tuple[str, ...]]:
    """Names of neighbours that are named like one of ``groups`` and read inputs of one width, each name once."""
    found: list[tuple[str, ...]] = []
    taken: set[str] = set()
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in layers):
        for group in groups:
            names = [f"{parent}.{name}".lstrip(".") for name in group]
            names = [name for name in names if name in layers and name not in taken]
            names = [name for name in names if not any(part in name for part in skip)]
            if len(names) > 1 and len({layers[name].in_features for name in names}) == 1:
                taken.update(names)
                found.append(tuple(names))
    return found


def _quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Quantized layers by name; those under adapters by the name that they had before."""
    found, under_adapters = {}, set()
    for name, module in model.named_modules():
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(layer, QuantizedLinear) and id(layer) not in under_adapters:
            found[name] = layer
            if layer is not module:
                under_adapters.add(id(layer))
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


class SharedInput(SharedResults):
    """LoRA layers that are computed by one autograd function."""

    def __call__(self, layer: LoraQuantizedLinear, x: Tensor, frozen: FrozenLinear) -> Tensor:
        """The result of ``layer``, whose :meth:`fused_inputs` is ``frozen``; the first call computes those of all."""
        kept: tuple[Any, Tensor] | None = self.found(layer, x)
        if kept is not None and kept[0] == _state_of(layer, frozen):
            return kept[1]
        layers = self.layers()
        # Inference tensors have no version that would show a write.
        if x.is_inference() or not _is_worth_it(frozen) or not any(each is layer for each in layers):
            return lora_linears(x, [frozen])[0]
        members = {layer: frozen}
        for other in layers:
            if other is not layer:
                its = other.fused_inputs(x)
                if its is not None and _kind(its) == _kind(frozen):
                    members[other] = its
        results = dict(zip(members, lora_linears(x, list(members.values())), strict=True))
        y = results.pop(layer)
        self.keep(x, {id(each): (_state_of(each, members[each]), its) for each, its in results.items()})
        return y


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
