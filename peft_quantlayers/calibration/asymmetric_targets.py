"""Weights that give the float model's outputs from the inputs that a quantized model makes. Pure arithmetic.

A layer of a quantized model reads ``x`` where the float model has ``x_float``. The weight ``W'`` of lowest
``E|W' x - W x_float|^2`` is ``W + W D (H + d)^-1`` with the deviation moment ``D = E[(x_float - x) x.T]`` and the
second moment ``H = E[x x.T]``. It is what is quantized, in place of ``W``.

Source: Li et al. 2025 (GPTAQ) for the target. Here it is made for all columns at once, ahead of any quantizer, and the
damping ``d`` is the one of lowest error on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods.any_threads import cholesky, sum_of_all
from .process_group import ALONE, Processes
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
    (damping,) = chosen_dampings([weight], statistics)
    return target_with(damping, weight, statistics)


def target_with(damping: float | None, weight: Tensor, statistics: InputStatistics | None) -> Tensor | None:
    """:func:`asymmetric_target` with one of :func:`chosen_dampings`."""
    if damping is None or statistics is None:
        return None
    weight = weight.float()
    moment, deviation = _moments(statistics, weight.device)
    return weight + _shift(weight @ deviation, _damped_factor(moment, damping))


def chosen_dampings(
    weights: Sequence[Tensor], statistics: InputStatistics | None, *, processes: Processes = ALONE
) -> list[float | None]:
    """For each of some layers that read the same input, the damping of lowest error.

    It is the one whose shift, fitted to one half of the tokens, has the lowest error on the other, both ways. None
    where none is better than the weight itself on each half, or nothing is known. ``processes``, all with the same
    arguments, try some each.
    """
    halves = None if statistics is None or statistics.deviation_moment is None else statistics.halves()
    if halves is None:
        return [None] * len(weights)
    rows = [weight[:: max(1, len(weight) // ROWS)].float() for weight in weights]
    moments, deviations = zip(*(_moments(half, rows[0].device) for half in halves), strict=True)
    products = [[each @ deviation for each in rows] for deviation in deviations]
    trials = [(damping, fitted) for damping in DAMPINGS for fitted in (0, 1)]

    def gains_of(trial: int) -> list[float]:
        """Of each weight, fitted to one half."""
        damping, fitted = trials[trial]
        factor = _damped_factor(moments[fitted], damping)
        shifts = [_shift(product, factor) for product in products[fitted]]
        held_out = 1 - fitted
        return [
            _held_out_gain(shift, moments[held_out], product)
            for shift, product in zip(shifts, products[held_out], strict=True)
        ]

    gains = processes.shared_out([1.0] * len(trials), gains_of)
    found: list[tuple[float, float | None]] = [(0.0, None)] * len(rows)
    for damping, *both in zip(DAMPINGS, gains[::2], gains[1::2], strict=True):
        for at, gains_of_weight in enumerate(zip(*both, strict=True)):
            if max(gains_of_weight) < 0 and sum(gains_of_weight) < found[at][0]:
                found[at] = (sum(gains_of_weight), damping)
    return [damping for _, damping in found]


def _damped_factor(moment: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of ``H + d``."""
    damped = moment.clone()
    damped.diagonal().add_(damping * moment.diagonal().mean())
    factor, is_found = cholesky(damped)
    if not is_found:
        raise ValueError("the second moment of the inputs has no Cholesky factor: inputs of the layer overflow.")
    return factor


def _shift(product: Tensor, factor: Tensor) -> Tensor:
    """``W D (H + d)^-1`` from ``product = W D``, shaped like ``W``."""
    return torch.cholesky_solve(product.t(), factor).t()


def _held_out_gain(shift: Tensor, moment: Tensor, product: Tensor) -> float:
    """The squared error of ``W + shift`` less that of ``W``; negative where the shift helps.

    ``E|shift x - W (x_float - x)|^2`` without what does not depend on the shift; ``product``: ``W D``.
    """
    return float(sum_of_all((shift @ moment - 2 * product) * shift))


def _moments(statistics: InputStatistics, device: torch.device) -> tuple[Tensor, Tensor]:
    moment, deviation = statistics.second_moment, statistics.deviation_moment
    assert moment is not None
    assert deviation is not None
    return moment.to(device), deviation.to(device)
