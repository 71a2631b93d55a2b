"""What is done with each layer, done with some random rows of it: how long it takes, and what memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import QuantSpec
from ..layers import QuantizedLinear
from .live_bytes import LiveBytes
from .processor_time import processor_seconds

# Weights that are worked on to see how long it takes: four times as many until it takes so many seconds, or it is a
# whole layer. Large ones take longer for each weight, since the system fills their memory with zeros every time.
_SAMPLE, _LARGEST_SAMPLE = 2**17, 2**24
_LONG_ENOUGH = 0.5

Work = Callable[[], object]
WorkOn = Callable[[Tensor, QuantSpec], Work]


@dataclass(frozen=True)
class SampledLayers:
    """How some random rows of each kind of layer were worked on.

    Fields:
        seconds: of all layers, at the sample's rate.
        layer_bytes: the most that one layer takes while it is quantized, its float32 weight included.
    """

    seconds: float
    layer_bytes: int


def sample_layers(
    specs: Mapping[str, QuantSpec],
    shapes: Mapping[str, Sequence[int]],
    *,
    work_on: WorkOn | None = None,
) -> SampledLayers:
    """Take a sample for each spec and number of inputs, once to see its memory and then to see its time.

    ``work_on``: makes what is timed from a weight (rows, in_features) and its spec; None: quantizing it.
    """
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
            _quantizing(weight, spec)()
        layer_bytes = max(layer_bytes, live.peak * largest_of[spec, inputs] // weight.numel())
        largest = min(_LARGEST_SAMPLE, largest_of[spec, inputs])
        seconds += _seconds_per_weight(work_on or _quantizing, spec, inputs, largest) * n_weights
    return SampledLayers(seconds=seconds, layer_bytes=layer_bytes)


def _quantizing(weight: Tensor, spec: QuantSpec) -> Work:
    return lambda: QuantizedLinear.from_weight(weight, None, spec)


def _seconds_per_weight(work_on: WorkOn, spec: QuantSpec, inputs: int, largest: int) -> float:
    """Of a sample of ``largest`` weights, or of fewer that take long enough."""
    size = min(_SAMPLE, largest)
    while True:
        weight = torch.randn(max(1, size // inputs), inputs)
        # What is done once in a process is not what is measured.
        seconds = min(processor_seconds(work_on(weight, spec)) for _ in range(2))
        if seconds >= _LONG_ENOUGH or size >= largest:
            return seconds / weight.numel()
        size = min(4 * size, largest)
