"""How long quantizing with calibration takes: its parts are done with random numbers, and scaled to the model.

The parts are statistics of inputs (by tokens), what is done for a layer however many rows it has (Cholesky factors),
what is done for each row, and the passes of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.asymmetric_targets import chosen_dampings, target_with
from ..calibration.blocks import Call
from ..calibration.initial_codes import chosen_initial_codes
from ..calibration.input_groups import layers_by_input
from ..calibration.layer_passes import LayerPasses
from ..calibration.quantize_calibrated import wanted_statistics
from ..calibration.statistics import InputStatistics, PairedInput, collect
from ..formats import QuantSpec
from ..layers.quantize_weight import quantize_weight
from .live_bytes import LiveBytes
from .processor_time import processor_seconds

# What a sample has: tokens, rows (a few and more of them), and inputs, above which times are scaled.
_TOKENS, _ROWS, _INPUTS = 256, (128, 384), 1536
# By how much Cholesky factors may take longer for twice as many inputs.
_LEAST_GROWTH, _MOST_GROWTH = 2**2.5, 2**3
# Of a block for each token: by the float model, from layer to layer while they are quantized, and with all quantized.
_PASSES = 3


@dataclass(frozen=True)
class _Times:
    """Seconds of one kind of layer: for each token of its input, for a layer, for each row of it."""

    token: float
    layer: float
    row: float


def calibration_seconds(
    model: PreTrainedModel, specs: Mapping[str, QuantSpec], shapes: Mapping[str, Sequence[int]], n_tokens: int
) -> float:
    """Of the processor, to quantize the layers ``specs`` of these shapes (..., out, in) on ``n_tokens``.

    Args:
        model: on the meta device, in which it is looked up which layers read the same input.
    """
    times: dict[tuple[QuantSpec, int], _Times] = {}
    seconds = seconds_of_product(n_tokens) * sum(math.prod(shapes[name]) for name in specs) * _PASSES
    for group in _groups(model, list(specs)):
        inputs = shapes[group[0]][-1]
        for at, name in enumerate(group):
            kind = (specs[name], inputs)
            if kind not in times:
                times[kind] = _times(*kind)
            n_layers, rows = math.prod(shapes[name][:-2]), math.prod(shapes[name][:-1])
            seconds += n_layers * times[kind].layer + rows * times[kind].row
            seconds += 0 if at else n_tokens * times[kind].token
    return seconds


def _groups(model: nn.Module, names: list[str]) -> list[list[str]]:
    """Layers that read one input; each for itself where the model cannot be followed on the meta device."""
    modules = dict(model.named_modules())
    layers = [name for name in names if name in modules]
    call = Call((), {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta"), "use_cache": False})
    try:
        with torch.no_grad(), LiveBytes():  # with it a number that the model asks a tensor for is 0
            groups, unreached = layers_by_input(LayerPasses(model, [call]), layers)
    except Exception:
        groups, unreached = [], layers
    return groups + [[name] for name in [*unreached, *(name for name in names if name not in modules)]]


def _times(spec: QuantSpec, inputs: int) -> _Times:
    """Measured with as many inputs, or with fewer ones and scaled."""
    size = inputs
    while size > _INPUTS and size % 2 == 0 and _fits(spec, size // 2):
        size //= 2
    at_size = _measured(spec, size)
    if size == inputs or not (size % 2 == 0 and _fits(spec, size // 2)):
        return at_size
    at_half = _measured(spec, size // 2)
    doublings = math.log2(inputs / size)
    # Of each token and each row there is one product with a square matrix, which fits no cache as it grows.
    return _Times(
        token=at_size.token * 4**doublings,
        layer=at_size.layer * _growth(at_size.layer, at_half.layer) ** doublings,
        row=at_size.row * 4**doublings,
    )


def _growth(at_size: float, at_half: float) -> float:
    """By a doubling, of what is cubic in the end and was measured where it is not yet."""
    measured = at_size / at_half if at_half > 0 else _MOST_GROWTH
    return min(max(measured, _LEAST_GROWTH), _MOST_GROWTH)


def _fits(spec: QuantSpec, inputs: int) -> bool:
    try:
        spec.layout_of((_ROWS[0], inputs))
    except ValueError:
        return False
    return True


def _measured(spec: QuantSpec, inputs: int) -> _Times:
    calibration = Calibration(data="", n_tokens=_TOKENS).of_float_model()
    x = torch.randn(_TOKENS, inputs)
    pair = PairedInput(x, x + 0.1 * torch.randn_like(x))
    wanted = wanted_statistics(calibration, [spec])
    statistics = collect([pair], wanted)
    assert statistics is not None, "random numbers are no zeros"
    few, many = (processor_seconds(_quantize, rows, spec, statistics, calibration) for rows in _ROWS)
    row = max(0.0, many - few) / (_ROWS[1] - _ROWS[0])
    return _Times(
        token=processor_seconds(collect, [pair], wanted) / _TOKENS,
        layer=max(0.0, few - row * _ROWS[0]),
        row=row,
    )


def _quantize(rows: int, spec: QuantSpec, statistics: InputStatistics, calibration: Calibration) -> None:
    """As the walk does it with one layer."""
    assert statistics.second_moment is not None
    weight = torch.randn(rows, len(statistics.second_moment))
    (damping,) = chosen_dampings([weight], statistics)
    target = target_with(damping, weight, statistics)
    aim = weight if target is None else target
    initial_codes = chosen_initial_codes(aim, spec, statistics, calibration, layer_name="a sample")
    hessian = statistics.hessian(damping=calibration.damping, shrinkage=calibration.used_shrinkage)
    quantize_weight(aim, spec, layer_name="a sample", hessian=hessian, initial_codes=initial_codes)


def seconds_of_product(n_tokens: int) -> float:
    """Of all tokens with one weight of a layer."""
    x, weight = torch.randn(_TOKENS, 1024), torch.randn(1024, 1024)
    return processor_seconds(nn.functional.linear, x, weight) / (_TOKENS * weight.numel()) * n_tokens
