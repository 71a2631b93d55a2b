"""Whether moving a scale leaves a model's outputs alone: tried on the model itself, which is put back to the bit.

Scales of powers of two are exact in binary floating point, so what a trial leaves over is no rounding: a fold that the
model's structure does not allow (a nonlinearity, another reader) shows however small it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call, evaluating
from .folds import Fold, divide_source, move_scale, restored

# Of the change that half of a fold makes, what may be left after the other half. What rounds at all are norms that add
# one to their weight, in the dtype of that weight; and float16, whose small numbers lose bits when they are divided.
TOLERANCE = 1e-5
TOLERANCE_IN_FLOAT16 = 1e-2
OFFSET_ROUNDINGS = 64
# The same for changes that round, such as rotations.
ROUNDED_TOLERANCE, ROUNDED_TOLERANCE_IN_HALF = 1e-3, 0.3


@torch.no_grad()
def is_preserving(model: nn.Module, call: Call, fold: Fold, before: list[Tensor]) -> bool:
    """Whether ``fold`` with some scales leaves the outputs ``before`` of ``model`` for ``call`` as they are."""
    generator = torch.Generator().manual_seed(0)
    scale = 4.0 ** torch.randint(0, 2, (fold.n_channels,), generator=generator)
    source = fold.source_tensors(model)
    with restored([*source, *fold.reader_tensors(model)]):
        with restored(source):
            divide_source(model, fold, scale)
            half = distance(outputs_of(model, call), before)
        move_scale(model, fold, scale)
        left = distance(outputs_of(model, call), before)
    tolerance = TOLERANCE_IN_FLOAT16 if source[0].dtype == torch.float16 else TOLERANCE
    if fold.norm_offset:
        tolerance = max(tolerance, OFFSET_ROUNDINGS * torch.finfo(source[0].dtype).eps)
    return half > 0 and left <= tolerance * half


@torch.no_grad()
def changes_nothing(
    model: nn.Module,
    call: Call,
    tensors: list[Tensor],
    *,
    half: Callable[[], None],
    whole: Callable[[], None],
    before: list[Tensor],
) -> bool:
    """Whether ``whole`` leaves the outputs ``before`` of ``model`` for ``call`` as they are, where ``half`` does not.

    Both change ``tensors`` of the model, which are put back to the bit. For changes that round.
    """
    with restored(tensors):
        half()
        change = distance(outputs_of(model, call), before)
    with restored(tensors):
        whole()
        left = distance(outputs_of(model, call), before)
    is_half = min(torch.finfo(tensor.dtype).bits for tensor in tensors) < 32
    return change > 0 and left <= (ROUNDED_TOLERANCE_IN_HALF if is_half else ROUNDED_TOLERANCE) * change


@torch.no_grad()
def outputs_of(model: nn.Module, call: Call) -> list[Tensor]:
    """All floating tensors that ``model`` gives for ``call``, float64."""
    with evaluating(model):
        return [tensor.double() for tensor in _floating(call.run(model))]


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """Euclidean distance of outputs; infinite where they differ in shape or are not numbers."""
    if [each.shape for each in left] != [each.shape for each in right]:
        return float("inf")
    total = sum(float((a - b).square().sum()) for a, b in zip(left, right, strict=True))
    return total**0.5 if total == total else float("inf")


def norm(outputs: list[Tensor]) -> float:
    """Euclidean norm of outputs."""
    return sum(float(each.square().sum()) for each in outputs) ** 0.5


def _floating(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in _floating(item)]
