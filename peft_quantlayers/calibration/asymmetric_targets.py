"""Weights that give the float model's outputs from the inputs that a quantized model makes. Pure arithmetic.

A layer of a quantized model reads ``x`` where the float model has ``x_float``. The weight ``W'`` of lowest
``E|W' x - W x_float|^2`` is ``W + W D (H + d)^-1`` with the deviation moment ``D = E[(x_float - x) x.T]`` and the
second moment ``H = E[x x.T]``. It is what is quantized, in place of ``W``.

Source: Li et al. 2025 (GPTAQ) for the target. Here it is made for all columns at once, ahead of any quantizer, and the
damping ``d`` is the one of lowest error on held-out tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..methods.any_threads import cholesky_, sum_of_all
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
    weight, moment, deviation = weight.float(), statistics.second_moment, statistics.deviation_moment
    assert moment is not None
    assert deviation is not None
    factor = _damped_factor(moment.to(weight.device, copy=True), damping)
    return weight + _shift(weight @ deviation.to(weight.device), factor)


def chosen_dampings(
    weights: Sequence[Tensor], statistics: InputStatistics | None, *, processes: Processes = ALONE
) -> list[float | None]:
    """For each of some layers that read the same input, the damping of lowest error.

    It is the one whose shift, fitted to one half of the tokens, has the lowest error on the other, both ways. None
    where none is better than the weight itself on each half, or nothing is known. ``processes``, all with the same
    arguments, try some each.
    """
    if statistics is None or statistics.deviation_moment is None or not statistics.has_halves:
        return [None] * len(weights)
    rows = [weight[:: max(1, len(weight) // ROWS)].float() for weight in weights]
    products = [statistics.half_products(each, "deviation_moment") for each in rows]
    trials: list[tuple[float, Literal[0, 1]]] = [(damping, fitted) for damping in DAMPINGS for fitted in (0, 1)]

    def gains_of(trial: int) -> list[float]:
        """Of each weight, fitted to one half."""
        damping, fitted = trials[trial]
        held_out = 1 - fitted
        factor = _damped_factor(statistics.half_moment(fitted, "second_moment").to(rows[0].device), damping)
        shifts = [_shift(of_weight[fitted], factor) for of_weight in products]
        del factor
        return [
            _held_out_gain(shift, statistics.half_products(shift, "second_moment")[held_out], of_weight[held_out])
            for shift, of_weight in zip(shifts, products, strict=True)
        ]

    gains = processes.shared_out([1.0] * len(trials), gains_of)
    found: list[tuple[float, float | None]] = [(0.0, None)] * len(rows)
    for damping, *both in zip(DAMPINGS, gains[::2], gains[1::2], strict=True):
        for at, gains_of_weight in enumerate(zip(*both, strict=True)):
            if max(gains_of_weight) < 0 and sum(gains_of_weight) < found[at][0]:
                found[at] = (sum(gains_of_weight), damping)
    return [damping for _, damping in found]


def _damped_factor(moment: Tensor, damping: float) -> Tensor:
    """The Cholesky factor of ``H + d``, in the memory of ``moment``."""
    moment.diagonal().add_(damping * moment.diagonal().mean())
    if not cholesky_(moment):
        raise ValueError("the second moment of the inputs has no Cholesky factor: inputs of the layer overflow.")
    return moment


def _shift(product: Tensor, factor: Tensor) -> Tensor:
    """``W D (H + d)^-1`` from ``product = W D``, shaped like ``W``."""
    half = torch.linalg.solve_triangular(factor, product.t(), upper=False)
    return torch.linalg.solve_triangular(factor.t(), half, upper=True).t()


def _held_out_gain(shift: Tensor, weighted: Tensor, product: Tensor) -> float:
    """The squared error of ``W + shift`` less that of ``W``; negative where the shift helps.

    ``E|shift x - W (x_float - x)|^2`` without what does not depend on the shift; ``weighted``: ``shift H``;
    ``product``: ``W D``.
    """
    return float(sum_of_all((weighted - 2 * product) * shift))
