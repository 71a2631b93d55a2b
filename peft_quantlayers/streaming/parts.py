"""A model cut into parts, each a file of its own until the end, and what is known of each quantized layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from ..formats import QuantSpec
from ..formats.quantized_weight import is_lossy_in_half
from ..integrations.float_checkpoint import FloatCheckpoint, TensorGroup, new_quantizer
from ..integrations.written_tensors import WrittenTensors
from ..layers import QuantizedLinear, quantized_modules
from ..layers.dense_types import dense_shape
from ..layers.replace import place_empty_layer
from ..methods import QuantConfig, spec_from_dict
from .work_folder import WorkFolder

# Of what a part becomes. Larger parts are repeated after a kill, smaller ones make more files.
PART_BYTES = 2**25


class PartsOfModel:
    """Groups of tensors of ``checkpoint``, put together until a part is large enough to be worth a file.

    With ``blocks``, names of modules, each of them is one part; what lies around them is put together apart from
    layers that are to be quantized, which are parts of their own.

    Attributes:
        checkpoint: the float model.
        specs: of the layers to quantize.
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
        specs: Mapping[str, QuantSpec],
        config: QuantConfig,
        *,
        device: torch.device | str | None = None,
        blocks: Sequence[str] = (),
    ) -> None:
        self.checkpoint, self.specs, self.config, self.device = checkpoint, dict(specs), config, device
        self.written = WrittenTensors(checkpoint, specs)
        self.layers: dict[str, dict[str, Any]] = {}
        self.sizes = {group.keys[0]: sum(map(self._n_bytes, group.parameters)) for group in checkpoint.groups}
        inside: dict[str, list[TensorGroup]] = {block: [] for block in blocks}
        around, late = [], []
        for group in checkpoint.groups:
            block = next((block for block in blocks if group.parameters[0].startswith(f"{block}.")), None)
            if block is not None:
                inside[block].append(group)
            elif blocks and any(name.removesuffix(".weight") in self.specs for name in group.parameters):
                late.append(group)
            else:
                around.append(group)
        self.parts = list(_packed(around, self.sizes))
        self.number_of = {block: len(self.parts) + index for index, block in enumerate(inside)}
        self.parts += inside.values()
        self.late = range(len(self.parts), len(self.parts) + len(late))
        self.parts += [[group] for group in late]

    @property
    def around(self) -> list[int]:
        """The parts that are no blocks."""
        return [number for number in range(len(self.parts)) if number not in self.number_of.values()]

    def quantize(self, work: WorkFolder, *, progress: bool) -> None:
        """Make all parts that ``work`` does not have. Raises ValueError for a layer that cannot be quantized."""
        quantizer = new_quantizer(self.checkpoint, self.config, self.specs)
        quantizer.device = self.device
        with tqdm(total=len(self.specs), desc="Quantizing", unit="layer", disable=not progress) as bar:
            for number, groups in enumerate(self.parts):
                before = len(self.layers)
                if work.is_finished(number):
                    self.restore(work.record(number)["layers"])
                else:
                    self.checkpoint.load(groups, quantizer)
                    self.keep(work, number)
                    self.checkpoint.release()
                bar.update(len(self.layers) - before)

    def keep(self, work: WorkFolder, number: int) -> None:
        """Store a part that is in memory, quantized."""
        parameters = {name for group in self.parts[number] for name in group.parameters}
        tensors, names = self.written.of_parameters(self.checkpoint.model, parameters)
        layers = self._record(parameters)
        work.keep(number, tensors, {"layers": layers, "names": names})
        self.layers |= layers

    def restore(self, layers: Mapping[str, Mapping[str, Any]]) -> None:
        """Put empty layers in the place of those that an earlier call has quantized."""
        for name, about in layers.items():
            place_empty_layer(
                self.checkpoint.model,
                name,
                spec_from_dict(about["spec"]),
                compute_dtype=about["compute_dtype"],
                device="meta",
            )
            self.layers[name] = dict(about)

    def _record(self, parameters: Iterable[str]) -> dict[str, dict[str, Any]]:
        """About the quantized layers in a part."""
        model = self.checkpoint.model
        layers = quantized_modules(model)
        names = (name.removesuffix(".weight") for name in parameters)
        return {
            name: _record_of(layers[name], is_half=model.dtype == torch.float16) for name in names if name in layers
        }

    def _n_bytes(self, parameter: str) -> int:
        name, _, tensor_name = parameter.rpartition(".")
        model = self.checkpoint.model
        if tensor_name == "weight" and name in self.specs:
            layout = self.specs[name].tensor_layout(*dense_shape(model, name))
            return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in layout.values())
        return model.get_parameter_or_buffer(parameter).nbytes


def _record_of(layer: QuantizedLinear, *, is_half: bool) -> dict[str, Any]:
    """What the config of the model has to say of a layer, and can say only while it is in memory."""
    return {
        "spec": layer.spec.to_dict(),
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
        "is_lossy": is_half and is_lossy_in_half(layer.quantized_weight),
    }


def _packed(groups: Iterable[TensorGroup], sizes: Mapping[str, int]) -> Iterator[list[TensorGroup]]:
    found: list[TensorGroup] = []
    total = 0
    for group in groups:
        size = sizes[group.keys[0]]
        if found and total + size > PART_BYTES:
            yield found
            found, total = [], 0
        found.append(group)
        total += size
    if found:
        yield found
