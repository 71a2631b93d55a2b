"""Rotations that are trained: coordinates without constraints, and a rounding that passes gradients. No model."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TrainedRotation(nn.Module):
    """An orthogonal matrix near ``start``: ``start @ (I - S)^-1 (I + S)`` with ``S`` skew-symmetric.

    Orthogonal for any values of its one parameter, so any optimizer will do.

    Args:
        start: (n, n), orthogonal, float64.
        keeps_mean: ``R @ ones == ones``, if that holds for ``start``.

    Source: the Cayley transform, as in Liu et al. 2024, "SpinQuant", which takes steps along it.
    """

    def __init__(self, start: Tensor, *, keeps_mean: bool = False) -> None:
        super().__init__()
        self.start, self.keeps_mean = start, keeps_mean
        self.coordinates = nn.Parameter(torch.zeros(start.shape, dtype=torch.float32, device=start.device))

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The matrix, (n, n), in ``dtype``; differentiable."""
        values = self.coordinates.to(dtype)
        if self.keeps_mean:  # the null space of S holds the ones
            values = values - values.mean(0)
            values = values - values.mean(1, keepdim=True)
        skew = values - values.t()
        identity = torch.eye(len(skew), dtype=dtype, device=skew.device)
        return self.start.to(dtype) @ torch.linalg.solve(identity - skew, identity + skew)

    @torch.no_grad()
    def matrix(self) -> Tensor:
        """The matrix, (n, n), float64: ``start`` itself, to the bit, where nothing was trained."""
        return self.forward(torch.float64) if self.coordinates.any() else self.start


def rounded_in_groups(weight: Tensor, nbits: int, group_size: int | None) -> Tensor:
    """``weight`` (..., in_features) on a grid from the least to the largest value of each group.

    Differentiable: codes are rounded straight through, and the step is a function of the weight. So a gradient says
    how the range of a group, and with it the error of all in it, becomes smaller.

    Args:
        weight: floating.
        nbits: of the codes.
        group_size: neighbouring inputs with one grid; None for a whole row.
    """
    groups = weight.unflatten(-1, (-1, group_size or weight.shape[-1]))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = ((high - low) / (2**nbits - 1)).clamp(min=1e-12)
    codes = (groups - low) / step
    codes = codes + (codes.round() - codes).detach()
    return (codes * step + low).flatten(-2)
