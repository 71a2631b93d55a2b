"""``approximate="requantize"``: the model quantized again onto a grid that a format holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..layers import dequantize_model
from ..layers.dense_types import dense_shape, dense_weight
from ..layers.expert_types import dense_stacks
from ..layers.quantized_layers import quantized_layers
from ..methods import HQQConfig, HQQSpec, get_method
from ..model import quantize_model
from .source_layer import SourceLayer

# Of a target's spec, what may differ from layer to layer.
_OWN_FIELDS = ("nbits", "group_size", "integer_zero", "symmetric")


def requantized_layers(
    layers: Mapping[str, SourceLayer], specs: Mapping[str, HQQSpec], float_weight: Callable[[str], Tensor] | None
) -> Callable[[str], QuantizedWeight]:
    """Gives each layer, by its name in the model, quantized again without data, from ``float_weight`` or else from
    what it is now. ``specs`` are by the names of ``layers``."""

    by_module = {layer.module: layer for layer in layers.values()}

    def weight(module: str) -> QuantizedWeight:
        layer = by_module[module]
        spec, own = specs[layer.name], None if float_weight is not None else layer.weight()

        def quantized(expert: int | None) -> QuantizedWeight:
            if own is None:
                dense = cast(Callable[[str], Tensor], float_weight)(module)
                dense = dense if expert is None else dense[expert]
            else:
                part = own if expert is None else own[expert]
                dense = get_method(part.spec.method).dequantize(part, dtype=torch.float32)
            return _bounded(get_method("hqq").quantize(dense.float(), spec))

        if layer.stack is None:
            return quantized(None)
        return QuantizedWeight.stacked(
            (quantized(expert) for expert in range(layer.stack.n_experts)), layer.stack.n_experts
        )

    return weight


def requantized_model(
    model: nn.Module, specs: Mapping[str, HQQSpec], *, float_model: nn.Module | None, calibration: Any
) -> Callable[[str], QuantizedWeight]:
    """Gives each layer of ``model`` quantized again with calibration data; ``model`` stays as it is.

    Args:
        model: with quantized layers.
        specs: of each of them, by its name in the model.
        float_model: the model that ``model`` was made from; None to quantize what it is now.
        calibration: for ``quantize_model``.
    """
    fresh = copy.deepcopy(model if float_model is None else float_model)
    if float_model is None:
        dequantize_model(fresh)
    first = next(iter(specs.values()))
    fields = {field.name: getattr(first, field.name) for field in dataclasses.fields(HQQSpec)}
    overrides = {
        name: {field: getattr(spec, field) for field in _OWN_FIELDS} for name, spec in specs.items() if spec != first
    }
    linears = [name for name, module in fresh.named_modules() if name and isinstance(module, nn.Linear)]
    skipped = [name for name in [*linears, *(name for name, _, _ in dense_stacks(fresh))] if name not in specs]
    config = HQQConfig(**fields, overrides=overrides or None, skip_modules=tuple(skipped) or None)
    quantize_model(fresh, config, calibration=calibration, progress=False)
    found = quantized_layers(fresh)
    return lambda name: _bounded(found[name].quantized_weight)


def float_weights(float_model: nn.Module) -> Callable[[str], Tensor]:
    """Reads weights (out_features, in_features), or those of all experts, of a float model by name in it."""
    return lambda name: dense_weight(float_model, name).detach()


def refuse_another_float_model(layers: Mapping[str, SourceLayer], float_model: nn.Module) -> None:
    """Raise ValueError unless ``float_model`` has a dense weight of the same shape for each of ``layers``."""
    ours = quantized_layers(float_model)
    if ours:
        raise ValueError(
            f"float_model is quantized itself, {next(iter(ours))} for example. Give the float model that this one was "
            "made of. Nothing was written."
        )
    for layer in layers.values():
        wanted = (layer.out_features, layer.in_features)
        try:
            found = tuple(dense_shape(float_model, layer.module)[-2:])
        except (AttributeError, TypeError, ValueError):
            found = ()
        if found != wanted:
            has = f"has the shape {found} in" if found else "is no layer of"
            raise ValueError(
                f"{layer.module} {has} float_model, and the shape {wanted} in the quantized model: this is not the "
                "float model that it was made of. Nothing was written."
            )


def _bounded(weight: QuantizedWeight) -> QuantizedWeight:
    """With zeros among the codes, which the solver may leave by a step or two in a group that is all of one sign."""
    zero = weight.tensors.get("zero")
    if zero is None:
        return weight
    top = (1 << weight.spec.nbits) - 1  # type: ignore[attr-defined]  # of an HQQSpec
    return dataclasses.replace(weight, tensors=weight.tensors | {"zero": zero.clamp(0, top)})
