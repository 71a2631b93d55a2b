"""What quantizing from files to files takes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..formats import QuantSpec
from ..layers import QuantizedLinear
from ..layers.dense_types import dense_shape
from ..layers.selection import quantizable_modules, quantizable_tables
from ..methods import QuantConfig
from ..report import summary
from ..streaming.quantize_files import PART_BYTES
from .estimates import Estimate
from .live_bytes import LiveBytes, bytes_of_imports
from .processor_time import processor_seconds

# A dense tensor is read, and copied where it is written.
_DENSE_COPIES = 2
# Weights that are quantized to see how long it takes: four times as many, until it takes long enough.
_SAMPLE, _LARGEST_SAMPLE = 2**17, 2**21
_LONG_ENOUGH = 0.05
# Of each token and block, in the two models that run beside each other: what enters the block, the sum that its
# branches are added to, and what the branch at work reads.
_STATES = 3
# Of the widest layer's second moment: two, and the deviation from the float model's inputs, of all tokens and of each
# half of them; the damped one, and what the damping of the targets is chosen with.
_MOMENTS = 10
# Of a weight, in float32, while its codes and its grid take turns.
_WORKING_COPIES = 8


def estimate_quantizing(model: PreTrainedModel, config: QuantConfig, *, calibration_tokens: int = 0) -> Estimate:
    """Memory, disk and time of ``quantize_checkpoint``, by quantizing some random rows for each kind of layer.

    Args:
        model: on the meta device, in the dtype of its files. It is left as it is.
        config: how it will be quantized.
        calibration_tokens: of the calibration; 0 for none. Its time is not estimated.

    Raises:
        ValueError: a shape that the config does not fit.
    """
    specs = quantizable_modules(model, config) | {
        name: spec for name, (_, spec) in quantizable_tables(model, config).items()
    }
    planned = summary(model, config)
    shapes = {name: tuple(dense_shape(model, name)) for name in specs}
    sample = sample_layers(specs, shapes)
    read = max((math.prod(shape[-2:]) for shape in shapes.values()), default=0) * model.dtype.itemsize
    largest = sample.layer_bytes + read + min(PART_BYTES, planned.nbytes)
    dense = max((module.nbytes for module in planned.dense), default=0) * _DENSE_COPIES
    memory = {"libraries": bytes_of_imports(), "largest layer": max(largest, dense)}
    notes = []
    if calibration_tokens:
        of_calibration = _of_calibration(model, shapes, calibration_tokens, sample.layer_bytes)
        memory = {"libraries": memory["libraries"]} | of_calibration
        notes.append("without the time of the calibration itself")
    return Estimate(
        step="quantize",
        memory=memory,
        disk=planned.nbytes,
        seconds=sample.seconds,
        notes=tuple(notes),
    )


def _of_calibration(
    model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], n_tokens: int, layer_bytes: int
) -> dict[str, int]:
    """Everything around the blocks, a block twice, the states of all tokens in it, and its widest layer's moments.

    ``layer_bytes``: what quantizing the largest layer takes without calibration.
    """
    text, size = model.config.get_text_config(), model.dtype.itemsize
    per_block = max(1, len(shapes) // max(1, text.num_hidden_layers))
    of_block = list(shapes.values())[:per_block]
    widest = max(shape[-1] for shape in of_block)
    of_layers = sum(math.prod(shape) for shape in shapes.values()) * size
    return {
        "around the blocks": sum(parameter.nbytes for parameter in model.parameters()) - of_layers,
        "one block, twice": 2 * sum(math.prod(shape) for shape in of_block) * size,
        "activations": 2 * n_tokens * (_STATES * text.hidden_size + widest) * size,
        "second moments": _MOMENTS * 4 * widest**2,
        "layer at work": max(layer_bytes, _WORKING_COPIES * 4 * max(math.prod(shape[-2:]) for shape in of_block)),
    }


@dataclass(frozen=True)
class SampledLayers:
    """How some random rows of each kind of layer were quantized.

    Fields:
        seconds: of all layers, at the sample's rate.
        layer_bytes: the most that one layer takes while it is quantized, its float32 weight included.
    """

    seconds: float
    layer_bytes: int


def sample_layers(specs: Mapping[str, QuantSpec], shapes: Mapping[str, Sequence[int]]) -> SampledLayers:
    """Quantize a sample for each spec and number of inputs, once to see its memory and then to see its time."""
    weights_of: Counter[tuple[QuantSpec, int]] = Counter()
    largest_of: dict[tuple[QuantSpec, int], int] = {}
    for name, spec in specs.items():
        kind = (spec, shapes[name][-1])
        weights_of[kind] += math.prod(shapes[name])
        largest_of[kind] = max(largest_of.get(kind, 0), math.prod(shapes[name][-2:]))
    seconds, layer_bytes = 0.0, 0
    for (spec, inputs), n_weights in weights_of.items():
        weight = torch.randn(max(1, _SAMPLE // inputs), inputs)
        with LiveBytes([weight]) as live:
            QuantizedLinear.from_weight(weight, None, spec)
        layer_bytes = max(layer_bytes, live.peak * largest_of[spec, inputs] // weight.numel())
        seconds += _seconds_per_weight(spec, inputs) * n_weights
    return SampledLayers(seconds=seconds, layer_bytes=layer_bytes)


def _seconds_per_weight(spec: QuantSpec, inputs: int) -> float:
    """Of a sample that is so large that it is not the overhead of a call that is measured."""
    size = _SAMPLE
    while True:
        weight = torch.randn(max(1, size // inputs), inputs)
        seconds = processor_seconds(QuantizedLinear.from_weight, weight, None, spec)
        if seconds >= _LONG_ENOUGH or size >= _LARGEST_SAMPLE:
            return seconds / weight.numel()
        size *= 4
