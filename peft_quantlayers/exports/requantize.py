"""``approximate="requantize"``: the model quantized again onto a grid that a format holds."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import QuantizedWeight
from ..layers import dequantize_model, quantized_modules
from ..layers.dense_types import dense_weight
from ..methods import HQQConfig, HQQSpec, get_method
from ..model import quantize_model
from .source import SourceLayer


def requantized_layers(
    layers: Mapping[str, SourceLayer], specs: Mapping[str, HQQSpec], float_weight: Callable[[str], Tensor] | None
) -> Callable[[str], QuantizedWeight]:
    """Gives each layer quantized again without data, from ``float_weight`` or else from what it is now."""

    def weight(name: str) -> QuantizedWeight:
        if float_weight is not None:
            dense = float_weight(name)
        else:
            own = layers[name].weight()
            dense = get_method(own.spec.method).dequantize(own, dtype=torch.float32)
        return _bounded(get_method("hqq").quantize(dense, specs[name]))

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
        name: {"nbits": spec.nbits, "group_size": spec.group_size} for name, spec in specs.items() if spec != first
    }
    skipped = [
        name for name, _ in fresh.named_modules() if name and _is_leaf_linear(fresh, name) and name not in specs
    ]
    config = HQQConfig(**fields, overrides=overrides or None, skip_modules=tuple(skipped) or None)
    quantize_model(fresh, config, calibration=calibration, progress=False)
    found = quantized_modules(fresh)
    return lambda name: _bounded(found[name].quantized_weight)


def float_weights(float_model: nn.Module) -> Callable[[str], Tensor]:
    """Reads weights (out_features, in_features), float32, of a float model by module name."""
    return lambda name: dense_weight(float_model, name).detach().float()


def _is_leaf_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)


def _bounded(weight: QuantizedWeight) -> QuantizedWeight:
    """With zeros among the codes, which the solver may leave by a step or two in a group that is all of one sign."""
    zero = weight.tensors.get("zero")
    if zero is None:
        return weight
    top = (1 << weight.spec.nbits) - 1  # type: ignore[attr-defined]  # of an HQQSpec
    return dataclasses.replace(weight, tensors=weight.tensors | {"zero": zero.clamp(0, top)})
