"""Scales and float zero points of HQQ groups, from float weights: arithmetic in float32, no layers and no files.

Whole zero points are found in ``solve_whole_zeros.py``.

The iterations are defined in ``solve_reference.py``; where the compiled kernels can be used (``solve_cpu.py``), they
do the same up to rounding, and to the bit while the shrink is not active.
"""

import torch
from torch import Tensor

from . import solve_cpu
from .solve_reference import HalfQuadraticOptions, affine_fit, encode, half_quadratic_offset

__all__ = ["HalfQuadraticOptions", "encode", "solve_groups"]

# Rounding and fitting lower the same squared error in turn; most groups converge within a few iterations.
REFINE_ITERS = 20
# The result depends on the start. A range somewhat inside a group's extremes is the second start: it lowers the error
# of 4-bit SmolLM2 by 6 %, and a third one by 0.6 % more.
SECOND_START = 0.9
# The errors are differences of much larger numbers in float32: a smaller difference than this is rounding.
REFINE_MARGIN = 4e-6


def solve_groups(
    groups: Tensor,
    *,
    nbits: int,
    options: HalfQuadraticOptions,
    round_zero: bool = False,
    refine_scale: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group.

    Args:
        groups: (n_groups, group_size), float32, finite.
        nbits: bits per code; codes run from 0 to ``2**nbits - 1``.
        options: constants of the half-quadratic iteration.
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
    extent = high - low
    # Below the smallest normal float the division overflows: such a group counts as one value.
    is_constant = extent <= max_code * torch.finfo(torch.float32).tiny
    steps_per_unit = torch.where(is_constant, torch.ones_like(extent), max_code / extent)
    shifted = (groups - low).mul_(steps_per_unit)

    low_steps = low * steps_per_unit
    start = low_steps - low_steps.round() if round_zero else torch.zeros_like(low)
    offset = _half_quadratic_offset(shifted, start, steps_per_unit, max_code=max_code, options=options)
    slope = torch.ones_like(offset)
    if refine_scale:
        slope, offset = _refined(shifted, offset, low_steps, max_code=max_code, round_zero=round_zero)
    scale = slope / steps_per_unit
    zero = offset - low / scale

    magnitude = low.abs()
    constant_scale = torch.where(magnitude > 0, magnitude, torch.ones_like(magnitude))
    scale = torch.where(is_constant, constant_scale, scale)
    return scale, torch.where(is_constant, -low.sign(), zero)


def _half_quadratic_offset(
    shifted: Tensor, offset: Tensor, steps_per_unit: Tensor, *, max_code: int, options: HalfQuadraticOptions
) -> Tensor:
    solve = solve_cpu.half_quadratic_offset if solve_cpu.can_solve(shifted) else half_quadratic_offset
    return solve(shifted, offset, steps_per_unit, max_code=max_code, options=options)


def _refined(
    shifted: Tensor, offset: Tensor, low_steps: Tensor, *, max_code: int, round_zero: bool
) -> tuple[Tensor, Tensor]:
    """The better of two refinements, from the half-quadratic solution and from a narrower range; (n_groups, 1)."""
    narrow = torch.full_like(offset, SECOND_START)
    zero = max_code / 2 - (low_steps + max_code / 2) / narrow
    start = (zero.round() if round_zero else zero) + low_steps / narrow
    fit = solve_cpu.affine_fit if solve_cpu.can_solve(shifted) else affine_fit
    return fit(shifted, offset, narrow, start, max_code=max_code, iters=REFINE_ITERS, margin=REFINE_MARGIN)
