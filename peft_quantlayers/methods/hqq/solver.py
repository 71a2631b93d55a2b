"""The half-quadratic solver on a matrix of groups: pure arithmetic in float32, no layers and no files.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Minimises
``sum |w - (q - zero) * scale| ** p`` over the zero of each group by alternating

* ``q = clamp(round(w / scale + zero))``,
* ``e = shrink(w - (q - zero) * scale)``, ``shrink(x) = sign(x) * relu(|x| - |x|**(p - 1) / beta)``,
* ``zero = mean(q - (w - e) / scale)``, ``beta = kappa * beta``.

The same iteration is done here with a hundredth of the work, for three reasons that change no result:

* ``shrink(x)`` is exactly zero for ``|x| <= beta ** (-1 / (2 - p))``. A residual is at most half a step, plus
  what the zero has moved where codes are clamped, so two numbers a group tell whether any power is needed.
* Without it ``zero = mean(q) - mean(w) / scale`` depends on the codes only through their sum. A sum that did
  not change gives the same zero to the bit, for as long as the shrink does not reach it: such a group is
  finished, and leaves the working set.
* Groups are shifted to start at 0 and the offset is added back at the end, so that a large common offset
  costs no precision.

Where this differs from the ``hqq`` package: it stops *all* groups of a matrix once the mean error of the whole
matrix rises, and then returns zeros that were never evaluated. Here every group stands alone, so that a row
gives the same codes whatever else is in the matrix: a group ends where it stops moving or after ``iters``
steps, and where the shrink is at work, which may raise the error, the best zero seen is kept. (Where it is
not, each step can only lower the squared error, and the last zero is the best.)

Where the compiled kernels are there, they do all of it, up to rounding, and without shrink to the bit:
``quantlayers_kernels.hqq.solve``.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlayers_kernels.hqq import solve


@dataclass(frozen=True, kw_only=True)
class HalfQuadraticOptions:
    """Constants of the published algorithm: norm ``p``, first ``beta``, its growth ``kappa``, steps ``iters``."""

    iters: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01


def solve_groups(
    groups: Tensor,
    *,
    nbits: int,
    options: HalfQuadraticOptions,
    integer_zero: bool = False,
    round_zero: bool = False,
    refine_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group.

    Args:
        groups: (n_groups, group_size), float32, finite.
        nbits: bits per code; codes run from 0 to ``2**nbits - 1``.
        options: constants of the half-quadratic iteration.
        integer_zero: keep the zero an integer code, as integer formats need it; the scale is then fitted to it.
        round_zero: start from a whole zero, as the ``hqq`` package does at 4 bits, so that a weight of 0.0 starts on
            the grid; the zero that is found is not whole.
        refine_scale: after the iteration, fit scale and zero to the codes by least squares and code again,
            until nothing moves. Never raises a group's squared error.

    Returns:
        scale, weight units per code step, and zero, in code units; both (n_groups, 1), float32. A group of one
        value is exact: scale is its magnitude (1 for zeros) and the zero makes code 0 stand for it.
    """
    max_code = 2**nbits - 1
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)  # eight times as fast as aminmax
    if integer_zero:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    extent = high - low
    # Below the smallest normal float the division overflows: such a group counts as one value.
    is_constant = extent <= max_code * torch.finfo(torch.float32).tiny
    steps_per_unit = torch.where(is_constant, torch.ones_like(extent), max_code / extent)
    shifted = (groups - low).mul_(steps_per_unit)

    low_steps = low * steps_per_unit
    start = low_steps - low_steps.round() if round_zero else torch.zeros_like(low)
    offset = _solve_offset(shifted, start, steps_per_unit, max_code=max_code, options=options)
    slope = torch.ones_like(offset)
    if refine_scale and not integer_zero:
        slope, offset = _refined(shifted, offset, low_steps, max_code=max_code, round_zero=round_zero)
    scale = slope / steps_per_unit
    zero = offset - low / scale
    if integer_zero:
        zero = zero.round().clamp_(0, max_code)
        scale = _fit_scale(groups, scale, zero, max_code=max_code)

    magnitude = low.abs()
    constant_scale = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
    scale = torch.where(is_constant, constant_scale, scale)
    if integer_zero:  # zero is in the range of codes, and code max_code or 0 stands for the value
        return scale, torch.where(is_constant, (low < 0).float(), zero)
    return scale, torch.where(is_constant, -low.sign(), zero)


def encode(groups: Tensor, scale: Tensor, zero: Tensor, *, max_code: int, out: Tensor | None = None) -> Tensor:
    """Nearest codes of ``groups`` (n_groups, group_size) on the given grid, as floats."""
    return torch.div(groups, scale, out=out).add_(zero).round_().clamp_(0, max_code)


def _solve_offset(
    shifted: Tensor, offset: Tensor, steps_per_unit: Tensor, *, max_code: int, options: HalfQuadraticOptions
) -> Tensor:
    """The half-quadratic zero of groups whose least value is 0 and whose step is 1; (n_groups, 1).

    ``shifted``: (n_groups, group_size), in steps. ``offset``: the zero to start from. ``steps_per_unit`` tells the
    size of a step in weight units, on which the shrink depends.
    """
    if not solve.can_solve(shifted):
        return _iterated_offset(shifted, offset, steps_per_unit, max_code=max_code, options=options)
    betas = _betas(options)
    return solve.offsets(
        shifted,
        offset,
        steps_per_unit,
        max_code=max_code,
        betas=betas,
        thresholds=[_threshold(beta, options) for beta in betas],
        smallest_threshold=_smallest_threshold(options),
        lp_norm=options.lp_norm,
    )


def _betas(options: HalfQuadraticOptions) -> list[float]:
    """The beta of each step."""
    betas = [options.beta]
    while len(betas) < options.iters:
        betas.append(min(betas[-1] * options.kappa, MAX_BETA))
    return betas[: options.iters]


def _smallest_threshold(options: HalfQuadraticOptions) -> float:
    """The size of a residual up to which no step shrinks any."""
    growth = math.exp(min(max(0.0, options.iters * math.log(options.kappa)), math.log(MAX_BETA)))
    return _threshold(options.beta * growth, options)


def _iterated_offset(
    shifted: Tensor, offset: Tensor, steps_per_unit: Tensor, *, max_code: int, options: HalfQuadraticOptions
) -> Tensor:
    """As :func:`_solve_offset`, in plain torch."""
    solved = offset.clone()
    best = torch.zeros_like(solved)
    best_error = torch.full_like(solved, torch.inf)
    is_shrunk = torch.zeros_like(solved, dtype=torch.bool)

    index = torch.arange(shifted.shape[0], device=shifted.device)
    mean = shifted.mean(1, keepdim=True)
    buffer = torch.empty_like(shifted)
    smallest_threshold = _smallest_threshold(options)
    for beta in _betas(options):
        codes = torch.add(shifted, offset, out=buffer[: shifted.shape[0]]).round_().clamp_(0, max_code)
        moved_to = codes.mean(1, keepdim=True).sub_(mean)

        largest_residual = offset.abs().clamp_(min=0.5).mul_(1 + 1e-5)
        may_shrink = largest_residual > _threshold(beta, options) * steps_per_unit[index]
        is_looked_at = (may_shrink | is_shrunk[index]).squeeze(1)
        if is_looked_at.any():
            here = is_looked_at.nonzero().squeeze(1)
            steps = steps_per_unit[index[here]]
            residual = (shifted[here] + offset[here] - codes[here]) / steps
            size = residual.abs()
            error = size.mean(1, keepdim=True)
            shrunk = residual.sign() * torch.relu(size - size.pow(options.lp_norm - 1) / beta)
            moved_to[here] += shrunk.mean(1, keepdim=True) * steps
            is_shrunk[index[here]] |= shrunk.any(1, keepdim=True)
            is_better = is_shrunk[index[here]] & (error < best_error[index[here]])
            best[index[here]] = torch.where(is_better, offset[here], best[index[here]])
            best_error[index[here]] = torch.where(is_better, error, best_error[index[here]])

        # A group that stands still moves again where a growing beta lets the shrink reach its residuals.
        shrinks_later = largest_residual > smallest_threshold * steps_per_unit[index]
        is_moving = ((moved_to != offset) | shrinks_later).squeeze(1)
        offset = moved_to
        solved[index] = offset
        n_moving = int(is_moving.sum())
        if n_moving == 0:
            break
        if n_moving < 0.6 * len(index):
            kept = is_moving.nonzero().squeeze(1)
            index, shifted, offset, mean = (part[kept] for part in (index, shifted, offset, mean))
    return torch.where(is_shrunk, best, solved)


# Far beyond where the shrink takes the whole residual, and finite in float32.
MAX_BETA = 1e30


def _threshold(beta: float, options: HalfQuadraticOptions) -> float:
    """The size of a residual up to which the shrink gives exactly zero."""
    return beta ** (-1.0 / (2.0 - options.lp_norm))


# Coding and fitting lower the same squared error in turn; most groups stand still after a handful of rounds.
REFINE_ITERS = 20
# Where they come to stand depends on the start. A range somewhat inside a group's extremes is the second start: it
# lowers the error of 4-bit SmolLM2 by 6 %, and a third one by 0.6 % more.
SECOND_START = 0.9
# The errors are differences of much larger numbers in float32: what they cannot tell apart is not better.
REFINE_MARGIN = 4e-6


def _refined(
    shifted: Tensor, offset: Tensor, low_steps: Tensor, *, max_code: int, round_zero: bool
) -> tuple[Tensor, Tensor]:
    """The better of two refinements, from the half-quadratic solution and from a narrower range; (n_groups, 1)."""
    narrow = torch.full_like(offset, SECOND_START)
    zero = max_code / 2 - (low_steps + max_code / 2) / narrow
    start = (zero.round() if round_zero else zero) + low_steps / narrow
    if solve.can_solve(shifted):
        return solve.lines(shifted, offset, narrow, start, max_code=max_code, iters=REFINE_ITERS, margin=REFINE_MARGIN)
    slope, offset, error = _fit_slope_and_offset(shifted, torch.ones_like(offset), offset, max_code=max_code)
    other_slope, other_offset, other_error = _fit_slope_and_offset(shifted, narrow, start, max_code=max_code)
    margin = REFINE_MARGIN * shifted.var(1, keepdim=True, correction=0)
    is_better = other_error < error - margin
    return torch.where(is_better, other_slope, slope), torch.where(is_better, other_offset, offset)


def _fit_slope_and_offset(
    shifted: Tensor, slope: Tensor, offset: Tensor, *, max_code: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and offset that minimise ``mean (shifted - slope * (q - offset))**2``, and that error; (n_groups, 1)."""
    solved_slope, solved_offset = slope.clone(), offset.clone()
    solved_error = torch.full_like(slope, torch.inf)
    index = torch.arange(shifted.shape[0], device=shifted.device)
    mean = shifted.mean(1, keepdim=True)
    buffer = torch.empty_like(shifted)
    spread = torch.mul(shifted, shifted, out=buffer).mean(1, keepdim=True) - mean.square()
    product = torch.empty_like(shifted)
    for _ in range(REFINE_ITERS):
        n_active = shifted.shape[0]
        codes = encode(shifted, slope, offset, max_code=max_code, out=buffer[:n_active])
        code_mean = codes.mean(1, keepdim=True)
        covariance = torch.mul(codes, shifted, out=product[:n_active]).mean(1, keepdim=True) - code_mean * mean
        variance = codes.square_().mean(1, keepdim=True) - code_mean.square()
        is_fitted = (variance > 0) & (covariance > 0)
        new_slope = torch.where(is_fitted, covariance / variance, slope)
        new_offset = torch.where(is_fitted, code_mean - mean / new_slope, offset)
        # With one bit the iteration may have put all values on one code; the plain range has two to start from.
        new_offset = torch.where(variance > 0, new_offset, torch.zeros_like(offset))
        is_moving = ((new_slope != slope) | (new_offset != offset)).squeeze(1)
        slope, offset = new_slope, new_offset
        solved_slope[index], solved_offset[index] = slope, offset
        solved_error[index] = torch.where(is_fitted, spread - covariance * new_slope, spread)
        n_moving = int(is_moving.sum())
        if n_moving == 0:
            break
        if n_moving < 0.6 * n_active:
            kept = is_moving.nonzero().squeeze(1)
            index, shifted, slope, offset = (part[kept] for part in (index, shifted, slope, offset))
            mean, spread = mean[kept], spread[kept]
    return solved_slope, solved_offset, solved_error


def _fit_scale(groups: Tensor, scale: Tensor, zero: Tensor, *, max_code: int) -> Tensor:
    """Scale that minimises ``sum (w - scale * (q - zero))**2`` for a fixed zero, coding and fitting in turn."""
    for _ in range(3):
        steps = encode(groups, scale, zero, max_code=max_code).sub_(zero)
        energy = steps.square().sum(1, keepdim=True)
        fitted = (steps * groups).sum(1, keepdim=True) / energy
        scale = torch.where((energy > 0) & (fitted > 0), fitted, scale)
    return scale
