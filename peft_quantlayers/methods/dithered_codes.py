"""Codes that stand for a weight plus a delta on average, for any method with ordered codes. Pure arithmetic."""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from quantlayers_kernels.dither import white_noise

# Rows after which the pattern of the dither repeats.
PATTERN_ROWS = 256


def dithered_codes(
    codes: Tensor, delta: Tensor, values: Callable[[Tensor], Tensor], *, max_code: int, first_row: int
) -> Tensor:
    """New codes: one of the two whose values surround ``value + delta``, so that the value is right on average.

    The upper code is chosen with a probability equal to the target's position between the two values. The noise is a
    fixed function of the position in the weight, so that the result is the same on every machine. Codes of weights
    without a delta stay as they are; targets beyond the range of codes get its last code.

    Args:
        codes: of a range of rows, (n, in_features), integer.
        delta: weight units, (n, in_features), float32.
        values: the weights (n, in_features), float32, that some codes of these rows stand for. Along the codes from 0
            to ``max_code`` the value of a weight never changes direction; it may fall (a negative scale).
        max_code: largest code.
        first_row: of the range in its weight.

    Returns:
        As ``codes``.
    """
    target = values(codes) + delta

    def value(candidates: Tensor) -> Tensor:
        return values(candidates.to(codes.dtype)) * direction

    low, high = (torch.full(codes.shape, code, dtype=torch.int32, device=codes.device) for code in (0, max_code))
    first, last = (values(candidates.to(codes.dtype)) for candidates in (low, high))
    direction = torch.where(last >= first, 1.0, -1.0)
    target *= direction
    # The largest code whose value is not above the target, by bisection.
    for _ in range(max_code.bit_length()):
        middle = low + (high - low + 1) // 2
        is_below = value(middle) <= target
        low = torch.where(is_below, middle, low)
        high = torch.where(is_below, high, torch.maximum(low, middle - 1))
    upper = (low + 1).clamp_(max=max_code)
    below, above = value(low), value(upper)
    fraction = torch.where(above > below, (target - below) / (above - below).clamp(min=1e-38), 0.0)
    rows = torch.arange(first_row, first_row + len(codes), device=codes.device) % PATTERN_ROWS
    is_upper = _noise(codes.shape[1], codes.device)[rows] < fraction
    return torch.where(delta == 0, codes, torch.where(is_upper, upper, low).to(codes.dtype))


@lru_cache(maxsize=32)
def _noise(in_features: int, device: torch.device) -> Tensor:
    """(PATTERN_ROWS, in_features), float32, uniform in (0, 1)."""
    return white_noise(PATTERN_ROWS * in_features, device).view(PATTERN_ROWS, in_features)
