"""HQQ's half-quadratic solver in plain torch: the definition that the compiled kernel must match.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". Minimises
``sum |w - (q - zero) * scale| ** p`` over the zero point of each group by alternating

* ``q = clamp(round(w / scale + zero))``,
* ``e = shrink(w - (q - zero) * scale)``, ``shrink(x) = sign(x) * relu(|x| - |x|**(p - 1) / beta)``,
* ``zero = mean(q - (w - e) / scale)``, ``beta = kappa * beta``.

This file does the same iteration with a hundredth of the work. Three facts make that possible without changing a
result:

* ``shrink(x)`` is exactly zero for ``|x| <= beta ** (-1 / (2 - p))``. A residual is at most half a step, plus the
  distance by which the zero point moved where codes are clamped, so two numbers per group tell whether any power is
  needed.
* Without it ``zero = mean(q) - mean(w) / scale`` depends on the codes only through their sum. If the sum does not
  change, the zero point stays the same to the bit, for as long as the shrink does not reach the group: the group has
  converged and leaves the working set.
* Groups are shifted to start at 0 and the offset is added back at the end, so that a large common offset costs no
  precision.

Difference from the ``hqq`` package: the package stops *all* groups of a matrix as soon as the mean error of the whole
matrix rises, and then returns zero points that were never evaluated. Here every group is solved alone, so that a row
gets the same codes whatever else is in the matrix: a group stops when it converges or after ``iters`` iterations, and
where the shrink is active, which may raise the error, the best zero point seen is kept. (Where it is not, each
iteration can only lower the squared error, and the last zero point is the best.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Far beyond the point where the shrink removes nothing, and finite in float32.
MAX_BETA = 1e30


@dataclass(frozen=True, kw_only=True)
class HalfQuadraticOptions:
    """Constants of the published algorithm: norm ``p``, first ``beta``, its growth ``kappa``, iterations ``iters``."""

    iters: int = 20
    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01


def encode(groups: Tensor, scale: Tensor, zero: Tensor, *, max_code: int, out: Tensor | None = None) -> Tensor:
    """Nearest codes of ``groups`` (n_groups, group_size) on the given grid, as floats."""
    return torch.div(groups, scale, out=out).add_(zero).round_().clamp_(0, max_code)


def betas_of(options: HalfQuadraticOptions) -> list[float]:
    """The beta of each iteration."""
    betas = [options.beta]
    while len(betas) < options.iters:
        betas.append(min(betas[-1] * options.kappa, MAX_BETA))
    return betas[: options.iters]


def smallest_threshold_of(options: HalfQuadraticOptions) -> float:
    """The largest residual that the shrink sets to zero in every iteration."""
    growth = math.exp(min(max(0.0, options.iters * math.log(options.kappa)), math.log(MAX_BETA)))
    return threshold_of(options.beta * growth, options)


def threshold_of(beta: float, options: HalfQuadraticOptions) -> float:
    """The largest residual that the shrink sets to exactly zero."""
    return beta ** (-1.0 / (2.0 - options.lp_norm))


def half_quadratic_offset(
    shifted: Tensor, offset: Tensor, steps_per_unit: Tensor, *, max_code: int, options: HalfQuadraticOptions
) -> Tensor:
    """The half-quadratic zero point of groups whose least value is 0 and whose step is 1; (n_groups, 1).

    Args:
        shifted: (n_groups, group_size), in steps.
        offset: the zero point to start from, (n_groups, 1).
        steps_per_unit: size of a unit of weight in steps, (n_groups, 1); the shrink is in units of weight.
        max_code: codes run from 0 to it.
        options: constants of the iteration.
    """
    solved = offset.clone()
    best = torch.zeros_like(solved)
    best_error = torch.full_like(solved, torch.inf)
    is_shrunk = torch.zeros_like(solved, dtype=torch.bool)

    index = torch.arange(shifted.shape[0], device=shifted.device)
    mean = shifted.mean(1, keepdim=True)
    buffer = torch.empty_like(shifted)
    smallest_threshold = smallest_threshold_of(options)
    for beta in betas_of(options):
        codes = torch.add(shifted, offset, out=buffer[: shifted.shape[0]]).round_().clamp_(0, max_code)
        moved_to = codes.mean(1, keepdim=True).sub_(mean)

        largest_residual = offset.abs().clamp_(min=0.5).mul_(1 + 1e-5)
        may_shrink = largest_residual > threshold_of(beta, options) * steps_per_unit[index]
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

        # A group that has converged moves again when a growing beta lets the shrink reach its residuals.
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


def affine_fit(
    shifted: Tensor,
    offset: Tensor,
    other_slope: Tensor,
    other_offset: Tensor,
    *,
    max_code: int,
    iters: int,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """The better of two least squares fits of ``slope * (q - offset)`` to ``shifted``; both (n_groups, 1).

    Args:
        shifted: (n_groups, group_size), in steps.
        offset: the first start, with a slope of 1; (n_groups, 1).
        other_slope, other_offset: the second start. Its fit is taken where its mean squared error is lower by more
            than ``margin`` times the variance of the group.
        max_code: codes run from 0 to it.
        iters: at most so many iterations of rounding and fitting.
    """
    slope, offset, error = _fit_slope_and_offset(
        shifted, torch.ones_like(offset), offset, max_code=max_code, iters=iters
    )
    other_slope, other_offset, other_error = _fit_slope_and_offset(
        shifted, other_slope, other_offset, max_code=max_code, iters=iters
    )
    is_better = other_error < error - margin * shifted.var(1, keepdim=True, correction=0)
    return torch.where(is_better, other_slope, slope), torch.where(is_better, other_offset, offset)


def _fit_slope_and_offset(
    shifted: Tensor, slope: Tensor, offset: Tensor, *, max_code: int, iters: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope and offset that minimise ``mean (shifted - slope * (q - offset))**2``, and that error; (n_groups, 1)."""
    solved_slope, solved_offset = slope.clone(), offset.clone()
    solved_error = torch.full_like(slope, torch.inf)
    index = torch.arange(shifted.shape[0], device=shifted.device)
    mean = shifted.mean(1, keepdim=True)
    buffer = torch.empty_like(shifted)
    spread = torch.mul(shifted, shifted, out=buffer).mean(1, keepdim=True) - mean.square()
    product = torch.empty_like(shifted)
    for _ in range(iters):
        n_active = shifted.shape[0]
        codes = encode(shifted, slope, offset, max_code=max_code, out=buffer[:n_active])
        code_mean = codes.mean(1, keepdim=True)
        covariance = torch.mul(codes, shifted, out=product[:n_active]).mean(1, keepdim=True) - code_mean * mean
        variance = codes.square_().mean(1, keepdim=True) - code_mean.square()
        is_fitted = (variance > 0) & (covariance > 0)
        new_slope = torch.where(is_fitted, covariance / variance, slope)
        new_offset = torch.where(is_fitted, code_mean - mean / new_slope, offset)
        # With one bit the iteration may have put all values on one code; an offset of 0 starts from two codes.
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
