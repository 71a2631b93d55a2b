"""A model cut into parts that are quantized one at a time, and what is known of each layer once it is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from tqdm.auto import tqdm

from ..formats import QuantSpec
from ..formats.quantized_weight import is_lossy_in_half
from ..integrations.float_checkpoint import FloatCheckpoint, TensorGroup, new_quantizer
from ..integrations.written_tensors import WrittenTensors
from ..layers import QuantizedLinear, QuantizedStack
from ..layers.dense_types import dense_shape
from ..layers.replace import place_empty_layer
from ..layers.selection import quantized_layers
from ..methods import QuantConfig, spec_from_dict
from .work_folder import WorkFolder

# Of what a part becomes. Larger parts are repeated after a kill, smaller ones make more files.
PART_BYTES = 2**26


class PartsOfModel:
    """Groups of tensors of ``checkpoint``, put together until a part is large enough to be worth a file.

    Attributes:
        checkpoint: the float model.
        specs: of the layers to quantize.
        written: what goes into the files.
        parts: the groups of each part, in the order of the files.
        layers: of the quantized layers so far, what :meth:`_record_of` says.
        sizes: about what each group takes once it is quantized, in bytes; by its first name in the files.
    """

    def __init__(
        self,
        checkpoint: FloatCheckpoint,
        specs: Mapping[str, QuantSpec],
        config: QuantConfig,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.checkpoint, self.specs, self.config = checkpoint, dict(specs), config
        self.written = WrittenTensors(checkpoint, specs)
        self.quantizer = new_quantizer(checkpoint, config, self.specs)
        self.quantizer.device = device
        self.layers: dict[str, dict[str, Any]] = {}
        self.sizes = {group.keys[0]: sum(map(self._n_bytes, group.parameters)) for group in checkpoint.groups}
        self.parts = list(_packed(checkpoint.groups, self.sizes))

    def quantize(self, work: WorkFolder, *, progress: bool) -> None:
        """Make all parts that ``work`` does not have. Raises ValueError for a layer that cannot be quantized."""
        bar = tqdm(total=len(self.specs), desc="Quantizing", unit="layer", disable=not progress)
        with bar:
            for number, groups in enumerate(self.parts):
                before = len(self.layers)
                if work.is_finished(number):
                    self.restore(work.record(number)["layers"])
                else:
                    self.checkpoint.load(groups, self.quantizer)
                    layers = self._record()
                    work.keep(number, self.written.in_memory(self.checkpoint.model), {"layers": layers})
                    self.checkpoint.release()
                    self.layers |= layers
                bar.update(len(self.layers) - before)

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

    def _record(self) -> dict[str, dict[str, Any]]:
        """About the quantized layers that are in memory."""
        model = self.checkpoint.model
        return {
            name: _record_of(layer, is_half=model.dtype == torch.float16)
            for name, layer in quantized_layers(model).items()
            if not layer.codes.is_meta
        }

    def _n_bytes(self, parameter: str) -> int:
        name, model = self.quantizer.quantized_name(parameter), self.checkpoint.model
        if name is not None:
            layout = self.specs[name].layout_of(dense_shape(model, name))
            return sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in layout.values())
        return model.get_parameter_or_buffer(parameter).nbytes


def _record_of(layer: QuantizedLinear | QuantizedStack, *, is_half: bool) -> dict[str, Any]:
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
