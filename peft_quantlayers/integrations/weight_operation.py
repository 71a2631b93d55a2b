"""What transformers' loader calls with each float weight that it has read, where a model is quantized on loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from ..formats import QuantSpec
from ..layers import quantize_module
from ..layers.dense_types import dense_key

# Failures that an error shows.
_SHOWN = 5


def joined_failures(failures: Sequence[str]) -> str:
    """One message of all that failed while a model was loaded; a weight that was tried twice is named once."""
    each = list(dict.fromkeys(failures))
    return "\n".join([*each[:_SHOWN], *([f"... and {len(each) - _SHOWN} more."] if each[_SHOWN:] else [])])


class WeightQuantizer(Protocol):
    """What is to be quantized, and what could not be.

    Attributes:
        specs: by the name of the module, or of the stack of experts.
        compute_dtype: of the layers; None for that of their weights.
        device: where to quantize; None for where each weight is.
        failures: messages, which end the loading once all weights are read.
    """

    specs: Mapping[str, QuantSpec]
    compute_dtype: str | None
    device: torch.device | str | None
    failures: list[str]

    def quantized_name(self, param_name: str) -> str | None:
        """The name in ``specs`` of the weight that a parameter is; None for others."""


class QuantizeWeight(ConversionOps):
    """Quantizes one float weight that the loader has read, in place of the module on the meta device."""

    def __init__(self, quantizer: WeightQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict, *, full_layer_name: str, model: nn.Module, missing_keys: set | None = None, **_: Any
    ) -> dict:
        # One tensor under any name, or all that a conversion of transformers made at once, by their whole names.
        names = [full_layer_name] if len(input_dict) == 1 else list(input_dict)
        rest = {}
        for name, value in zip(names, input_dict.values(), strict=True):
            quantized_name = self.quantizer.quantized_name(name)
            if quantized_name is None:
                rest[name] = value
                continue
            self._quantize(model, quantized_name, value[0] if isinstance(value, list) else value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return rest

    def _quantize(self, model: nn.Module, name: str, weight: torch.Tensor) -> None:
        key = dense_key(model, name)
        parent, _, parameter = key.rpartition(".")
        expected = model.get_parameter(key).shape
        if weight.shape != expected:  # transformers does not compare what is quantized
            self.quantizer.failures.append(
                f"{key} has the shape {tuple(weight.shape)} in the files, and config.json asks for "
                f"{tuple(expected)}. They do not belong together."
            )
            return
        setattr(model.get_submodule(parent), parameter, nn.Parameter(weight, requires_grad=False))
        try:
            quantize_module(
                model,
                name,
                self.quantizer.specs[name],
                compute_dtype=self.quantizer.compute_dtype,
                device=self.quantizer.device,
            )
        except ValueError as error:
            # transformers would catch it here, and raise a RuntimeError without the reason at the end.
            self.quantizer.failures.append(str(error))
