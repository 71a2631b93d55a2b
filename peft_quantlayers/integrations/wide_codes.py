"""Codes of more than a byte in files and in transformers' hands: the file has them as integers of the layout's dtype,
a layer registers their bytes (``layers/codes_parameter.py`` says why)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..formats import QuantSpec
from ..layers.codes_parameter import SENDABLE, as_bytes, as_codes
from ..layers.dense_types import dense_shape
from ..layers.quantized_layers import quantized_layers


@dataclass(frozen=True, kw_only=True)
class WideCodes:
    """A :class:`StoredLayer` of which only the codes are converted, to bytes."""

    shape: tuple[int, ...]
    tensor_names: tuple[str, ...]

    def convert(self, tensor_name: str, stored: Tensor) -> Tensor:
        return as_bytes(stored)


def layers_with_wide_codes(specs: Mapping[str, QuantSpec], model: nn.Module) -> dict[str, WideCodes]:
    """The layers of ``specs``, still dense in ``model``, whose codes are converted when they are read."""
    found = {}
    for name, spec in specs.items():
        shape = dense_shape(model, name)
        if spec.layout_of(shape)[spec.codes_name].dtype not in SENDABLE:
            found[name] = WideCodes(shape=shape, tensor_names=(spec.codes_name,))
    return found


def state_with_wide_codes(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """``state``, the whole state of ``model`` or nothing, as files have it."""
    found = dict(state)
    for name, layer in quantized_layers(model).items():
        key = f"{name}.{layer.spec.codes_name}"
        if layer.has_wide_codes and key in found:
            found[key] = as_codes(found[key], layer.codes_dtype)
    return found
