"""A weight on a uniform grid, which is what formats of integers with scales hold. Pure maths on tensors.

Here too: the two ways to put a grid with float zeros into a format with integer zeros. No files, no names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import QuantizedWeight

# Codes of the container that ``approximate="8bit"`` uses.
MAX_WIDE_CODE = 255


@dataclass(frozen=True, kw_only=True)
class UniformGrid:
    """``(code - zero) * scale``, with one scale and zero for each group of neighbouring inputs of a row.

    Fields:
        codes: (out_features, in_features), uint8, each below ``2**nbits``.
        scale: weight units per code step, (out_features, n_groups), float32.
        zero: the code that stands for 0.0, in code units, shaped like ``scale``, float32.
        nbits: bits per code.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    nbits: int

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << self.nbits) - 1

    def dequantize(self) -> Tensor:
        """The weight, (out_features, in_features), float32."""
        groups = self.codes.float().view(*self.scale.shape, -1)
        return ((groups - self.zero.unsqueeze(-1)) * self.scale.unsqueeze(-1)).view(self.codes.shape)

    def rows(self, rows: slice) -> UniformGrid:
        """The weight's rows ``rows`` alone."""
        return dataclasses.replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=self.zero[rows])

    def with_groups_of(self, group_size: int) -> UniformGrid:
        """The same weight with smaller groups, each with the scale and zero of the group that it is part of.

        Raises:
            ValueError: ``group_size`` does not divide the present one.
        """
        if self.group_size % group_size:
            raise ValueError(f"groups of {group_size} are not parts of groups of {self.group_size}.")
        repeats = self.group_size // group_size
        scale, zero = (part.repeat_interleave(repeats, dim=1) for part in (self.scale, self.zero))
        return dataclasses.replace(self, scale=scale, zero=zero)


def uniform_grid(weight: QuantizedWeight) -> UniformGrid:
    """The grid of an HQQ weight with groups along the inputs (:func:`why_not_uniform` is empty for its spec)."""
    scale = weight.tensors["scale"].float()
    zero = weight.tensors.get("zero")
    nbits = weight.spec.nbits  # type: ignore[attr-defined]  # of an HQQSpec
    middle = torch.full_like(scale, float(1 << (nbits - 1)))
    return UniformGrid(codes=weight.codes(), scale=scale, zero=middle if zero is None else zero.float(), nbits=nbits)


def are_zeros_codes(zero: Tensor, nbits: int) -> bool:
    """Whether every zero is an integer from 0 to ``2**nbits - 1``, as formats with integer zeros store it."""
    return bool((zero == zero.round()).all() and (zero >= 0).all() and (zero < 1 << nbits).all())


def in_eight_bits(grid: UniformGrid) -> UniformGrid:
    """About the same weight in 8-bit codes with integer zeros: each step is divided into as many parts as fit.

    Codes keep their places: 4-bit codes are multiplied by 17, so that only the zero is rounded, to 1/17 of a step. A
    zero outside the codes gets fewer parts, and the codes an offset; 8-bit codes are then rounded too.
    """
    zero, top = grid.zero, grid.max_code
    widest = torch.maximum(torch.maximum(zero, top - zero), torch.full_like(zero, top))
    ratio = MAX_WIDE_CODE / widest
    parts = torch.where(ratio < 1, ratio, ratio.floor())
    shift = torch.clamp(-(zero * parts).round(), min=0)  # of codes and zero, where the zero lies below the codes
    codes = (grid.codes.float().view(*zero.shape, -1) * parts.unsqueeze(-1)).round() + shift.unsqueeze(-1)
    return UniformGrid(
        codes=codes.clamp(max=MAX_WIDE_CODE).to(torch.uint8).view(grid.codes.shape),
        scale=grid.scale / parts,
        zero=((zero * parts).round() + shift).clamp(max=MAX_WIDE_CODE),
        nbits=8,
    )


def with_rounded_zeros(grid: UniformGrid) -> tuple[UniformGrid, Tensor, Tensor]:
    """The grid with each zero at the nearest code, and ``(A, B)`` whose product restores the weight exactly.

    Rounding a zero moves all weights of a group by the same amount, so the correction has one column per group.

    Returns:
        The grid; A, (n_groups, in_features), float32, ones where an input is in a group; and B,
        (out_features, n_groups), float32, weight units. ``B @ A`` added to the rounded weight gives the weight.
    """
    zero = grid.zero.round().clamp(0, grid.max_code)
    A = torch.eye(grid.scale.shape[1]).repeat_interleave(grid.group_size, dim=1)
    return dataclasses.replace(grid, zero=zero), A, grid.scale * (zero - grid.zero)
