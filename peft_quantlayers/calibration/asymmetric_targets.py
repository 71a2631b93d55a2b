"""Weights that give the float model's outputs from the inputs that a quantized model makes. Pure arithmetic.

A layer of a quantized model reads ``x`` where the float model has ``x_float``. The weight ``W'`` of lowest
``E|W' x - W x_float|^2`` is ``W + W D (H + d)^-1`` with the deviation moment ``D = E[(x_float - x) x.T]`` and the
second moment ``H = E[x x.T]``. It is what is quantized, in place of ``W``.

Source: Li et al. 2025 (GPTAQ) for the target. Here it is made for all columns at once, ahead of any quantizer, and the
damping ``d`` is the one of lowest error on held-out tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import InputStatistics

# Tried in this order, as fractions of the mean of H's diagonal.
DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0)
# Rows of a weight by which the damping is chosen.
ROWS = 128


def asymmetric_target(weight: Tensor, statistics: InputStatistics | None) -> Tensor | None:
    """What to quantize in place of ``weight``; None where nothing is known that lowers the error on held-out tokens.

    Args:
        weight: (out_features, in_features), any floating dtype.
        statistics: of the layer's inputs, with "second_moment", "deviation_moment" and "first_half".

    Returns:
        (out_features, in_features), float32, on the device of ``weight``.
    """
    if statistics is None or statistics.deviation_moment is None:
        return None
    damping = chosen_damping(weight, statistics)
    if damping is None:
        return None
    weight = weight.float()
    return weight + _shift(weight, statistics, damping)


def chosen_damping(weight: Tensor, statistics: InputStatistics) -> float | None:
    """The damping whose shift, fitted to one half of the tokens, has the lowest error on the other, both ways.

    None where none is better than ``weight`` itself on each half.
    """
    halves = statistics.halves()
    if halves is None:
        return None
    rows = weight[:: max(1, len(weight) // ROWS)].float()
    found: tuple[float, float | None] = (0.0, None)
    for damping in DAMPINGS:
        gains = [
            _held_out_gain(rows, _shift(rows, fitted, damping), held_out)
            for fitted, held_out in (halves, halves[::-1])
        ]
        if max(gains) < 0 and sum(gains) < found[0]:
            found = (sum(gains), damping)
    return found[1]


def _shift(weight: Tensor, statistics: InputStatistics, damping: float) -> Tensor:
    """``W D (H + d)^-1``, shaped like ``weight``."""
    moment, deviation = _moments(statistics, weight)
    damped = moment.clone()
    damped.diagonal().add_(damping * moment.diagonal().mean())
    factor = torch.linalg.cholesky(damped)
    return torch.cholesky_solve((weight @ deviation).t(), factor).t()


def _held_out_gain(weight: Tensor, shift: Tensor, statistics: InputStatistics) -> float:
    """The squared error of ``weight + shift`` less that of ``weight``; negative where the shift helps.

    ``E|shift x - W (x_float - x)|^2`` without what does not depend on the shift.
    """
    moment, deviation = _moments(statistics, weight)
    return float(((shift @ moment - 2 * (weight @ deviation)) * shift).sum())


def _moments(statistics: InputStatistics, weight: Tensor) -> tuple[Tensor, Tensor]:
    moment, deviation = statistics.second_moment, statistics.deviation_moment
    assert moment is not None
    assert deviation is not None
    return moment.to(weight.device), deviation.to(weight.device)
