"""Checkpoints that hold each expert as quantized layers of its own, read into the stacks of the model.

So transformers 4 wrote them. transformers' own conversions of float experts say which layer of which expert belongs
into which fused weight, and where: gate and up lie one above the other in each expert's weight.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
)

from ..formats import QuantSpec, TensorLayout
from ..formats.checkpoint_format import ModelDescription, StoredLayer
from ..layers.codes_parameter import as_bytes
from ..layers.dense_types import dense_shape
from ..layers.expert_types import find_stack
from .checkpoint_names import CheckpointNames
from .expert_conversion import read_tensor
from .tensor_conversion import NoOperation, converted_name

_PATTERN = "experts of quantized stacks"


@dataclass(frozen=True, kw_only=True)
class StackOfLayers:
    """The stored layers that make one stack.

    Fields:
        name: of the stack in the model.
        spec: of the stack.
        tensor_names: of each layer.
        shared_names: those of them that all rows of a layer share; the others have entries for each row.
        layer: how each is stored, where it is converted when it is read.
        parts: names in the checkpoint, of each part of an expert's weight (gate, up) one for each expert, in order.
    """

    name: str
    spec: QuantSpec
    layout: Mapping[str, TensorLayout]
    layer: StoredLayer | None
    parts: tuple[tuple[str, ...], ...]

    def expert(self, tensor_name: str, stored: Sequence[Tensor]) -> Tensor:
        """The tensor ``tensor_name`` of one expert's weight, from those of its parts.

        Raises:
            ValueError: one is not as the layout says.
        """
        entry = self.layout[tensor_name]
        parts = list(stored)
        if self.layer is not None and tensor_name in self.layer.tensor_names:
            parts = [self.layer.convert(tensor_name, tensor) for tensor in parts]
        for part in parts:
            if (tuple(part.shape), part.dtype) != (entry.shape, entry.dtype):
                raise ValueError(
                    f"an expert's tensor is {part.dtype} of shape {tuple(part.shape)}, and {self.spec} has "
                    f"{entry.dtype} of shape {entry.shape}. The file is damaged, or belongs to another config.json."
                )
        if len(parts) == 1:
            return parts[0]
        return torch.stack(parts) if entry.rows_per_entry is None else torch.cat(parts)

    def tensor(self, tensor_name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor ``tensor_name`` of the stack; ``read`` gives that of a layer, by its stored name."""
        experts = zip(*self.parts, strict=True)
        return torch.stack([self.expert(tensor_name, [read(name) for name in names]) for names in experts])

    @property
    def stored_names(self) -> tuple[str, ...]:
        """All names in the checkpoint."""
        return tuple(name for part in self.parts for name in part)


def stacks_of_layers(
    model: nn.Module, description: ModelDescription, names: CheckpointNames
) -> dict[str, StackOfLayers]:
    """The stacks of ``model``, by name, that the checkpoint of ``description`` holds expert by expert.

    Raises:
        ValueError: experts or parts are missing, are stored in different ways, or cannot lie in one weight.
    """
    specs = description.specs
    found = {}
    for stack_name, by_part in _parts(model, specs, names).items():
        n_experts, *sides = dense_shape(model, stack_name)
        stored = [sorted(part, key=dot_natural_key) for part in by_part]
        first = next(part for part in stored if part)[0]
        if {len(part) for part in stored} != {n_experts}:
            counts = ", ".join(str(len(part)) for part in stored)
            raise ValueError(
                f"{first}: the checkpoint holds {counts} quantized layers of the experts of {stack_name}, which has "
                f"{n_experts}. Download or save it again."
            )
        kinds = {(specs[name], description.stored_layers.get(name)) for part in stored for name in part}
        if len(kinds) > 1:
            raise ValueError(
                f"{stack_name}: its experts are stored in {len(kinds)} different ways, for example "
                f"{sorted(str(spec) for spec, _ in kinds)[:2]}, and a stack has one. Quantize the float model with "
                "peft_quantlayers."
            )
        spec, layer = kinds.pop()
        out_features, in_features = sides[0] // len(stored), sides[1]
        layout = spec.tensor_layout(out_features, in_features)
        whole = spec if len(stored) == 1 else spec.joined(len(stored), out_features, in_features)
        if whole is None:
            raise ValueError(
                f"{first}: the checkpoint holds each expert of a mixture as quantized layers of its own, and "
                f"two {spec.method} weights (gate and up) cannot lie in one, as transformers 5 keeps them: {spec} "
                "has groups over the rows of each. Use the checkpoint with transformers 4 and the package that wrote "
                "it, or quantize the float model with peft_quantlayers."
            )
        found[stack_name] = StackOfLayers(
            name=stack_name,
            spec=whole,
            layout=layout,
            layer=layer,
            parts=tuple(map(tuple, stored)),
        )
    return found


def _parts(model: nn.Module, specs: Iterable[str], names: CheckpointNames) -> dict[str, list[list[str]]]:
    """Of each stack the stored names of each part of its experts' weights."""
    is_known = isinstance(model, PreTrainedModel)
    conversions: list[Any] = get_model_conversion_mapping(model) if is_known else []
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter) and _stacks(entry.operations)]
    of_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    parts: dict[str, list[list[str]]] = {}
    keys = {f"{name}.weight": name for name in specs}
    for key, renamed in names.renamed(keys).items():
        target, pattern = converted_name(renamed, converters)
        if pattern is None:
            continue
        place = names.parameters([target]).get(target, target)
        if find_stack(model, place) is not None:
            patterns = list(of_pattern[pattern].source_patterns)
            parts.setdefault(place, [[] for _ in patterns])[patterns.index(pattern)].append(keys[key])
    return parts


def _stacks(operations: Any) -> bool:
    """Whether they put matrices of experts into one tensor, the parts of an expert one above the other."""
    first, *rest = operations
    is_plain = all(isinstance(each, Concatenate) and each.dim == 1 for each in rest)
    return isinstance(first, MergeModulelist) and first.dim == 0 and len(rest) <= 1 and is_plain


class StackedTensors(WeightConverter):
    """A conversion of transformers that makes the tensors of stacks from those of single experts.

    ``places``: the parameter and the part, by the name that transformers compares with conversions; ``stacks``: by
    name, all with as many parts.
    """

    def __init__(
        self, places: Mapping[str, tuple[str, int]], stacks: Mapping[str, StackOfLayers], failures: list[str]
    ) -> None:
        n_parts = len(next(iter(stacks.values())).parts)
        self.patterns = [f"{_PATTERN}: {part} of {n_parts}" for part in range(n_parts)]
        super().__init__(list(self.patterns), _PATTERN, [NoOperation()])
        self.places, self.stacks, self.failures = places, stacks, failures

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        found = self.places.get(source_key)
        return (source_key, None) if found is None else (found[0], self.patterns[found[1]])

    def convert(  # type: ignore[override]
        self, layer_name: str, *args: Any, loading_info: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        stack_name, _, tensor_name = layer_name.rpartition(".")
        if loading_info is not None:
            loading_info.missing_keys.discard(layer_name)
        stack = self.stacks[stack_name]
        parts = [self.collected_tensors.pop(pattern) for pattern in self.patterns if pattern in self.collected_tensors]
        try:
            tensor = torch.stack(
                [
                    stack.expert(tensor_name, [read_tensor(tensor) for tensor in tensors])
                    for tensors in zip(*parts, strict=True)
                ]
            )
            return {layer_name: as_bytes(tensor) if tensor_name == stack.spec.codes_name else tensor}
        except (ValueError, RuntimeError) as error:
            self.failures.append(f"{layer_name}: {error}")
            return {}

    def reverse_transform(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(self.places, self.stacks, self.failures)  # transformers makes a copy for each tensor


def stacked_tensors(
    stacks: Mapping[str, StackOfLayers], keys: Iterable[str], names: CheckpointNames, failures: list[str]
) -> list[StackedTensors]:
    """The conversions for the tensors ``keys`` of the files that belong to ``stacks``; [] if none do."""
    owners = {
        name: (stack, part) for stack in stacks.values() for part, held in enumerate(stack.parts) for name in held
    }
    places: dict[int, dict[str, tuple[str, int]]] = defaultdict(dict)
    for key, renamed in names.renamed(keys).items():
        name, _, tensor_name = key.rpartition(".")
        stack, part = owners.get(name, (None, 0))
        if stack is not None and tensor_name in stack.layout:
            places[len(stack.parts)][renamed] = (f"{stack.name}.{tensor_name}", part)
    return [
        StackedTensors(found, {name: s for name, s in stacks.items() if len(s.parts) == n_parts}, failures)
        for n_parts, found in places.items()
    ]
