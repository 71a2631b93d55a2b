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

from ..arguments import check_model
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
# Parts of the names of attention modules whose keys and values read an encoder's states.
CROSS_ATTENTION = ("encoder_attn", "crossattention", "cross_attn")


def fuse_projections(
    model: nn.Module, groups: Iterable[Sequence[str]] = PROJECTIONS, *, skip: Iterable[str] = CROSS_ATTENTION
) -> list[tuple[str, ...]]:
    """Compute layers that read the same input together: q, k and v, gate and up. Experimental.

    The model and the names of its modules do not change. The first layer of a group that is called computes the
    results of all, and the others return theirs:

    - In inference, for a few tokens on a CPU with several threads, in one call of the kernel, with or without adapters
      and with the same bits; what a token gains is in ``docs/inference-speed.md``.
    - In training, layers with LoRA, with one autograd function. Results are the same up to rounding, and up to the
      order in which dropout draws. All results of a group need one backward pass. On a CPU its gain is within the
      noise of a training step, and it has not been measured on a GPU.

    A layer is computed alone, as before, if it is called with another input, in compiled code or with inference
    tensors, if torch saw a write to it since (it sees none through ``.data``), or in training if its adapter is not
    plain LoRA, is merged or disabled. Copies of the model are not fused.

    Args:
        model: a model with quantized layers, with adapters or without.
        groups: names of neighbouring layers that share their input, by default those of transformers. Replaces what
            an earlier call has fused; ``()`` fuses nothing.
        skip: parts of names of modules to leave out, by default those of attention to an encoder.

    Returns:
        Names of the modules in each group that was found.

    Raises:
        ValueError: no quantized layer in the model.
        TypeError: ``model`` is not a module, or a string where several are wanted.
    """
    check_model("fuse_projections", model)
    groups = _several(groups, "groups", 'groups=[("q_proj", "k_proj")]')
    groups = [_several_names(group, "groups", 'groups=[("q_proj", "k_proj")]') for group in groups]
    skip = _several_names(skip, "skip", 'skip=["encoder_attn"]')
    bases = _quantized_layers(model)
    if not bases:
        raise ValueError("the model has no quantized layer, so nothing can be fused. Call quantize_model first.")
    with_lora = {name: module for name, module in model.named_modules() if isinstance(module, LoraQuantizedLinear)}
    for layer in with_lora.values():
        layer.shared_input = None
    for base in bases.values():
        base.shared_product = None
    found: list[tuple[str, ...]] = []
    waste = Waste()
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in bases):
        for group in groups:
            names = [f"{parent}.{name}".lstrip(".") for name in group]
            names = [name for name in names if name in bases and not any(part in name for part in skip)]
            names = [name for name in names if bases[name].shared_product is None]
            if len(names) > 1 and len({bases[name].in_features for name in names}) == 1:
                _fuse({name: bases[name] for name in names}, with_lora, waste)
                found.append(tuple(names))
    if found:
        _warn_that_it_is_experimental()
    elif groups:
        logger.warning("nothing was fused: no neighbouring quantized layers are named like one of %s.", groups)
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


def _fuse(bases: Mapping[str, QuantizedLinear], with_lora: Mapping[str, LoraQuantizedLinear], waste: Waste) -> None:
    product = SharedProduct(list(bases.values()), list(bases), waste)
    for base in bases.values():
        base.shared_product = product
    names = [name for name in bases if name in with_lora]
    if len(names) > 1:
        shared = SharedInput([with_lora[name] for name in names], names, waste)
        for name in names:
            with_lora[name].shared_input = shared


@cache
def _warn_that_it_is_experimental() -> None:
    logger.warning(
        "fuse_projections is experimental and may change: on a CPU it gains a little of a generated token, and in a "
        "training step less than the noise; on a GPU it was not measured. Measure your own with and without it."
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
