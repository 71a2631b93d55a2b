"""Converts tensors of published checkpoints into those of our layers while transformers reads them, one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..formats.checkpoint_format import StoredLayer
from ..layers.dense_types import dense_shape


class StoredLayers:
    """The layers of a model whose tensors are converted when they are read, by module name.

    ``stored_names`` are the names in the file, which may lack the base model's prefix. ``failures`` collects errors:
    transformers would catch an error in a conversion, and raise a RuntimeError without the reason at the end.
    """

    def __init__(
        self, layers: Mapping[str, StoredLayer], *, stored_names: Mapping[str, str], failures: list[str]
    ) -> None:
        self.layers = layers
        self.stored_names = stored_names
        self.failures = failures

    def check_shapes(self, model: nn.Module) -> None:
        """Raise ValueError where a layer is not of the shape of its module in ``model``."""
        for name, layer in self.layers.items():
            if layer.shape != dense_shape(model, name):
                raise ValueError(
                    f"{name}: the checkpoint holds a weight of shape {layer.shape}, the model wants "
                    f"{dense_shape(model, name)}."
                )

    def conversions(self) -> list[WeightConverter]:
        """What tells transformers to pass the tensors of these layers, and no others, through :meth:`convert`.

        One pattern holds all names. Its target is the name itself.
        """
        if not self.layers:
            return []
        keys = [
            rf"{re.escape(self.stored_names[name])}\.(?:{'|'.join(layer.tensor_names)})"
            for name, layer in self.layers.items()
        ]
        return [WeightConverter(f"^({'|'.join(keys)})$", r"\1", [_ConvertTensor(self)])]

    def convert(self, parameter_name: str, stored: Tensor) -> dict[str, Tensor]:
        """The tensor of our layer by its name; nothing where it cannot be converted."""
        name, _, tensor_name = parameter_name.rpartition(".")
        try:
            return {parameter_name: self.layers[name].convert(tensor_name, stored)}
        except (ValueError, RuntimeError) as error:
            self.failures.append(f"{parameter_name}: {error}")
            return {}

    def forget_conversions(self, model: PreTrainedModel) -> None:
        """Take the conversions off a loaded model: it is saved in our layout, not in that of the file."""
        if not self.layers:
            return
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or []
            if not any(isinstance(operation, _ConvertTensor) for operation in getattr(conversion, "operations", ()))
        ]


class _ConvertTensor(ConversionOps):
    def __init__(self, stored_layers: StoredLayers) -> None:
        # transformers gives tensors to an operation with this attribute in the dtype of the file.
        self.hf_quantizer = stored_layers

    def __deepcopy__(self, memo: dict) -> Self:
        return self  # transformers copies the conversion for each tensor

    def convert(
        self, input_dict: dict, *, full_layer_name: str, missing_keys: set | None = None, **_: Any
    ) -> dict[str, Tensor]:
        (stored,) = input_dict.values()
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return self.hf_quantizer.convert(full_layer_name, stored[0] if isinstance(stored, list) else stored)


def ignore_tensors(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Keep transformers from reporting tensors whose last name part is one of ``names`` as unexpected."""
    patterns = {rf"\.{name}$" for name in names}
    if patterns:
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns
