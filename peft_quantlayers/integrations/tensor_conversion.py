"""What becomes of the tensors of quantized layers between a file and the model: transformers' own conversions, which
split, join and turn float weights, are kept off them, and tensors of other layouts are converted one at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter

from ..formats.checkpoint_format import StoredLayer
from ..layers.dense_types import dense_shape
from ..layers.quantized_layers import quantized_layers, replaced_parameters

_PATTERN = "tensors of quantized layers"


class StoredLayers:
    """The layers of a model whose tensors are converted when they are read, by module name.

    ``failures`` collects errors: transformers would catch an error in a conversion, and raise a RuntimeError without
    the reason at the end.
    """

    def __init__(self, layers: Mapping[str, StoredLayer], *, failures: list[str]) -> None:
        self.layers = layers
        self.failures = failures

    def check_shapes(self, model: nn.Module) -> None:
        """Raise ValueError where a layer is not of the shape of its module in ``model``."""
        for name, layer in self.layers.items():
            if layer.shape != dense_shape(model, name):
                raise ValueError(
                    f"{name}: the checkpoint holds a weight of shape {layer.shape}, the model wants "
                    f"{dense_shape(model, name)}."
                )

    def convert(self, parameter_name: str, stored: Tensor) -> Tensor | None:
        """The tensor of our layer, from the stored one; None where it cannot be converted."""
        name, _, tensor_name = parameter_name.rpartition(".")
        layer = self.layers.get(name)
        if layer is None or tensor_name not in layer.tensor_names:
            return stored
        try:
            return layer.convert(tensor_name, stored)
        except (ValueError, RuntimeError) as error:
            self.failures.append(f"{parameter_name}: {error}")
            return None


def converted_name(name: str, converters: Iterable[WeightConverter]) -> tuple[str, str | None]:
    """The name that the first converter that takes ``name`` gives it, and the pattern that took it.

    ``apply_converters`` of transformers, which 5.20 does not have.
    """
    for converter in converters:
        name, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return name, pattern
    return name, None


class NoOperation(ConversionOps):
    """Not called, but transformers asks for one."""

    def convert(self, input_dict: dict, **kwargs: Any) -> dict:
        return input_dict


class QuantizedTensors(WeightConverter):
    """A conversion of transformers that takes the tensors of quantized layers, so that no other one does.

    Placed before all others. ``names`` are the parameters by the names that transformers compares with conversions;
    a name that is not there is left to the others. Without ``layers`` the tensors stay as they are.
    """

    def __init__(self, names: Mapping[str, str], layers: StoredLayers | None = None) -> None:
        super().__init__(_PATTERN, _PATTERN, [NoOperation()])
        self.names = names
        self.layers = layers

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        name = self.names.get(source_key)
        return (source_key, None) if name is None else (name, _PATTERN)

    def convert(  # type: ignore[override]
        self, layer_name: str, *args: Any, loading_info: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        ((stored, *_),) = self.materialize_tensors().values()
        tensor = stored if self.layers is None else self.layers.convert(layer_name, stored)
        if loading_info is not None:
            loading_info.missing_keys.discard(layer_name)
        return {} if tensor is None else {layer_name: tensor}

    def reverse_transform(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(self.names, self.layers)  # transformers makes a copy for each tensor


def _is_of_ours(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and isinstance(entry.operations[0], NoOperation)


def keep_from_conversions(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Have ``model`` saved with the tensors ``names``, all that it has, in the layout that they have in it.

    transformers takes its conversions back when it saves. Those of float weights must not be applied to codes; and a
    weight that is joined with others in a file stays by itself where some of the others are quantized.
    """
    conversions: Any = getattr(model, "_weight_conversions", None)
    if conversions is None:  # the same choice as transformers makes where the model was not loaded
        conversions = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(entry, PrefixChange)
        ]
    conversions = [entry for entry in conversions if not _is_of_ours(entry)]
    converters = [entry.reverse_transform() for entry in conversions[::-1] if isinstance(entry, WeightConverter)]
    own = {
        f"{name}.{tensor_name}"
        for name, layer in quantized_layers(model).items()
        for tensor_name, _ in layer.named_parameters()
        if tensor_name != "bias"
    }
    sentinels = list(replaced_parameters(model))
    own.update(sentinels)
    n_parts = {pattern: len(entry.source_patterns) for entry in converters for pattern in entry.source_patterns}
    joined: dict[str, dict[str, str]] = defaultdict(dict)
    kept = set()
    for name in [*names, *sentinels]:
        target, pattern = converted_name(name, converters)
        if pattern is not None and name in own:
            kept.add(name)
        elif pattern is not None:
            joined[target][pattern] = name
    for parts in joined.values():
        if len(parts) < max(n_parts[pattern] for pattern in parts):
            kept.update(parts.values())
    if kept:  # transformers goes through the list from its end
        model._weight_conversions = [*conversions, QuantizedTensors({name: name for name in kept})]


def ignore_tensors(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Keep transformers from reporting tensors whose names end with one of ``names``, patterns, as unexpected."""
    patterns = {rf"(^|\.){name}$" for name in names}
    if patterns:
        model._keys_to_ignore_on_load_unexpected = set(model._keys_to_ignore_on_load_unexpected or ()) | patterns
