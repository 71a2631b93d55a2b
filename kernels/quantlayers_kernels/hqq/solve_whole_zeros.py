"""Scales of HQQ groups whose zero points are whole codes: integer ones within the codes, or the middle code.

With a whole zero point a grid is the multiples of one scale, seen through a window of ``2**nbits`` of them. The
error has many local minima in the scale, and rounding the zero point of a float solution ends in a poor one. So
several ranges are tried, each refined by least squares, and the best is kept. Arithmetic in float32 on groups; no
layers and no files.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .solve_reference import encode

# Fractions of a group's range that the codes span at the start: with few bits it pays to clip the largest weights.
RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
FIT_ITERS = 2
# How much more the squared error of a large weight counts: this times its square over the group's mean square. Large
# weights often meet large activations, most of all in query and key projections. Least squares alone clips them, and
# every layer that does so shrinks its outputs: one per cent in each adds up over a model, unlike random errors.
LARGE_WEIGHTS = 0.25
# Of a group whose largest weight is 1; a group of zeros has no other.
SMALLEST_STEP = 1e-30


def solve_whole_zeros(
    groups: Tensor, *, nbits: int, is_symmetric: bool = False, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and whole zero point of each group with a low squared error.

    Args:
        groups: (n_groups, group_size), float32, finite.
        nbits: bits per code; codes run from 0 to ``2**nbits - 1``.
        is_symmetric: all zero points are ``2**(nbits - 1)``, from 2 bits. A scale may then be negative: below that
            zero point lies one code more than above it, and it goes to the side that needs it.
        importance: weight of each squared error, broadcast to ``groups``, positive. None where no data says it: then
            large weights get somewhat more than small ones (:data:`LARGE_WEIGHTS`).

    Returns:
        scale, weight units per code step, and zero, in code units; both (n_groups, 1), float32. A group of one value
        is exact.
    """
    max_code = 2**nbits - 1
    unit = groups.abs().amax(1, keepdim=True)
    unit = torch.where(unit > 0, unit, torch.ones_like(unit))
    groups = groups / unit  # no square overflows, and none vanishes
    if importance is None:
        squares = groups.square()
        importance = squares.mul_(LARGE_WEIGHTS / squares.mean(1, keepdim=True).clamp_(min=SMALLEST_STEP)).add_(1.0)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    starts = _symmetric_starts(low, high, nbits) if is_symmetric else _starts(low, high, max_code)
    scale, zero = _best(groups, starts, max_code, importance)
    if not is_symmetric:
        moved = ((scale, (zero + step).clamp_(0, max_code)) for step in (0, -1, 1))
        scale, zero = _best(groups, moved, max_code, importance)

    # A group of one value, or too small to divide: its magnitude is the scale, and a code next to the zero point
    # stands for it.
    is_constant = (high == low) | ((high - low) * unit <= max_code * torch.finfo(torch.float32).tiny)
    scale = torch.where(is_constant, unit, scale * unit)
    return scale, zero if is_symmetric else torch.where(is_constant, (low < 0).float(), zero)


def _starts(low: Tensor, high: Tensor, max_code: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Grids that span fractions of the range from the lowest to the highest value, and 0.0."""
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    step = ((high - low) / max_code).clamp_(min=SMALLEST_STEP)
    zero = (-low / step).round_().clamp_(0, max_code)
    for fraction in RANGES:
        yield fraction * step, zero


def _symmetric_starts(low: Tensor, high: Tensor, nbits: int) -> Iterator[tuple[Tensor, Tensor]]:
    """As :func:`_starts`, with the zero point in the middle, and with either sign of the scale."""
    below = 2 ** (nbits - 1)
    zero = torch.full_like(low, below)
    for sign, negative, positive in ((1, -low, high), (-1, high, -low)):
        step = torch.maximum(negative / below, positive / (below - 1)).clamp_(min=SMALLEST_STEP)
        for fraction in RANGES:
            yield sign * fraction * step, zero


def _best(
    groups: Tensor, starts: Iterable[tuple[Tensor, Tensor]], max_code: int, importance: Tensor
) -> tuple[Tensor, Tensor]:
    """Of all ``starts``, each with its scale refined, the one with the lowest error for each group."""
    best = torch.full_like(groups[:, :1], torch.inf)
    best_scale, best_zero = torch.ones_like(best), torch.zeros_like(best)
    for start, zero in starts:
        scale = _fitted_scale(groups, start, zero, max_code, importance)
        error = encode(groups, scale, zero, max_code=max_code).sub_(zero).mul_(scale).sub_(groups).square_()
        error = error.mul_(importance).sum(1, keepdim=True)
        is_better = error < best
        best = torch.where(is_better, error, best)
        best_scale, best_zero = torch.where(is_better, scale, best_scale), torch.where(is_better, zero, best_zero)
    return best_scale, best_zero


def _fitted_scale(groups: Tensor, scale: Tensor, zero: Tensor, max_code: int, importance: Tensor) -> Tensor:
    """Scale that minimises the weighted squared error for a fixed zero point, rounding and fitting in turn."""
    for _ in range(FIT_ITERS):
        steps = encode(groups, scale, zero, max_code=max_code).sub_(zero)
        weighted = steps * importance
        energy = (weighted * steps).sum(1, keepdim=True)
        fitted = (weighted * groups).sum(1, keepdim=True) / energy
        scale = torch.where((energy > 0) & (fitted * scale > 0) & fitted.isfinite(), fitted, scale)
    return scale
