"""A model cut into parts, each a file of its own until the end, and what is known of each quantized layer."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..formats import QuantSpec
from ..formats.quantized_weight import is_lossy_in_half
from ..integrations.float_checkpoint import FloatCheckpoint, new_quantizer
from ..integrations.tensor_groups import TensorGroup
from ..integrations.written_tensors import WrittenTensors
from ..layers.dense_types import dense_shape
from ..layers.embedding_tables import place_empty_tables
from ..layers.quantized_layers import QuantizedLayer, quantized_layers
from ..layers.quantized_storage import QuantizedStorage
from ..layers.replace import place_empty_layer, quantize_tables
from ..layers.selection import quantizable_tables, select_modules
from ..methods import QuantConfig, spec_from_dict
from ..storage.free_memory import return_free_memory
from .work_folder import WorkFolder


class PartsOfModel:
    """Groups of tensors of ``checkpoint``, put together until a part would take more than ``part_bytes``.

    With ``blocks``, names of modules, each of them is one part; what lies around them is put together apart from
    layers that are to be quantized, which are parts of their own. There may be none, in a model of one block.

    Attributes:
        checkpoint: the float model.
        specs: of the layers to quantize; those that the config selects.
        tables: the embedding tables to quantize, by the first of their names.
        written: what goes into the files.
        parts: the groups of each part.
        number_of: the part that each block is.
        late: parts with layers to be quantized outside of the blocks; none without ``blocks``.
        layers: of the quantized layers so far, what :func:`_record_of` says.
        sizes: about what each group takes once it is quantized, in bytes; by its first name in the files.
    """

    def __init__(
        self,
        checkpoint: FloatCheckpoint,
        config: QuantConfig,
        *,
        specs: Mapping[str, QuantSpec] | None = None,
        device: torch.device | str | None = None,
        blocks: Sequence[str] | None = None,
        part_bytes: int,
    ) -> None:
        self.checkpoint, self.config, self.device, self.part_bytes = checkpoint, config, device, part_bytes
        self.specs = select_modules(checkpoint.model, config).specs if specs is None else dict(specs)
        self.tables = quantizable_tables(checkpoint.model, config)
        self._all_specs = self.specs | {name: spec for table, spec in self.tables.values() for name in table.names}
        self.written = WrittenTensors(checkpoint, self._all_specs)
        self.layers: dict[str, dict[str, Any]] = {}
        self.sizes = {group.keys[0]: sum(map(self._n_bytes, group.parameters)) for group in checkpoint.groups}
        inside: dict[str, list[TensorGroup]] = {block: [] for block in blocks or ()}
        around, late = [], []
        for group in checkpoint.groups:
            block = next((block for block in blocks or () if group.parameters[0].startswith(f"{block}.")), None)
            if block is not None:
                inside[block].append(group)
            elif blocks is not None and any(_layer_of(name, self._all_specs) for name in group.parameters):
                late.append(group)
            else:
                around.append(group)
        self.parts = list(_packed(around, self.sizes, part_bytes))
        self.number_of = {block: len(self.parts) + index for index, block in enumerate(inside)}
        self.parts += inside.values()
        self.late = range(len(self.parts), len(self.parts) + len(late))
        self.parts += [[group] for group in late]

    @property
    def around(self) -> list[int]:
        """The parts that are no blocks."""
        return [number for number in range(len(self.parts)) if number not in self.number_of.values()]

    def make(self, work: WorkFolder, number: int) -> None:
        """Quantize and store a part. Raises ValueError for a layer that cannot be quantized."""
        quantizer = new_quantizer(self.checkpoint, self.config, self.specs)
        quantizer.device = self.device
        self.checkpoint.load(self.parts[number], quantizer)
        self.quantize_tables()
        self.keep(work, number)
        self.checkpoint.release()
        return_free_memory()

    def quantize_tables(self) -> None:
        """Quantize the embedding tables that are in memory."""
        self.checkpoint.tie()
        model, found = self.checkpoint.model, {}
        for name, (table, spec) in self.tables.items():
            weight: Any = getattr(model.get_submodule(name), "weight", None)
            if not isinstance(model.get_submodule(name), QuantizedStorage) and not weight.is_meta:
                found[name] = (table, spec)
        quantize_tables(model, found, self.config, device=self.device)

    def take(self, work: WorkFolder, number: int) -> None:
        """Put empty layers in the place of those of a finished part."""
        self.restore(work.record(number)["layers"])

    def keep(self, work: WorkFolder, number: int) -> None:
        """Store a part that is in memory, quantized."""
        parameters = {name for group in self.parts[number] for name in group.parameters}
        tensors, names = self.written.of_parameters(self.checkpoint.model, parameters)
        layers = self._record(parameters)
        work.keep(number, tensors, {"layers": layers, "names": names})
        self.layers |= layers

    def restore(self, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Put empty layers in the place of those that an earlier call has quantized."""
        model = self.checkpoint.model
        specs = {name: spec_from_dict(about["spec"]) for name, about in layers.items()}
        dtypes = {name: about["compute_dtype"] for name, about in layers.items()}
        tables = place_empty_tables(model, specs, compute_dtypes=dtypes, device="meta")
        for name, about in layers.items():
            if name not in tables:
                place_empty_layer(model, name, specs[name], compute_dtype=dtypes[name], device="meta")
            self.layers[name] = dict(about)

    def _record(self, parameters: Iterable[str]) -> dict[str, dict[str, Any]]:
        """About the quantized layers in a part."""
        model = self.checkpoint.model
        layers = quantized_layers(model)
        names = list(filter(None, (_layer_of(name, layers) for name in parameters)))
        sharing = {id(layer) for name in names for layer in layers[name].sharing}
        names += [name for name, layer in layers.items() if id(layer) in sharing and name not in names]
        return {name: _record_of(layers[name], is_half=model.dtype == torch.float16) for name in names}

    def _n_bytes(self, parameter: str) -> int:
        name, model = _layer_of(parameter, self._all_specs), self.checkpoint.model
        if name is not None:
            layout = self._all_specs[name].layout_of(dense_shape(model, name))
            return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in layout.values())
        return model.get_parameter_or_buffer(parameter).nbytes


def _layer_of(parameter: str, layers: Collection[str]) -> str | None:
    """The one of ``layers`` whose weight ``parameter`` is: a stack of experts of that name, or a module; or None."""
    return next((name for name in (parameter, parameter.removesuffix(".weight")) if name in layers), None)


def _record_of(layer: QuantizedLayer, *, is_half: bool) -> dict[str, Any]:
    """What the config of the model has to say of a layer, and can say only while it is in memory."""
    return {
        "spec": layer.spec.to_dict(),
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
        "is_lossy": is_half and is_lossy_in_half(layer.quantized_weight),
    }


def _packed(groups: Iterable[TensorGroup], sizes: Mapping[str, int], part_bytes: int) -> Iterator[list[TensorGroup]]:
    found: list[TensorGroup] = []
    total = 0
    for group in groups:
        size = sizes[group.keys[0]]
        if found and total + size > part_bytes:
            yield found
            found, total = [], 0
        found.append(group)
        total += size
    if found:
        yield found
