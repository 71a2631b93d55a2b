"""Zeros and scales of HQQ groups with the compiled kernels, one group in each lane. See ``csrc/hqq_solve.h``.

The definition, and the way where the kernels are not there, is ``peft_quantlayers/methods/hqq/solver.py``, whose
names these are. Groups are shifted to start at 0 and scaled to a step of 1.
"""

import torch
from torch import Tensor

from .. import native
from ..interface import HQQAffineFit, HQQGroups, HQQHalfQuadratic

# A worker holds 16 groups, 1 MiB of them at this size.
MAX_GROUP_SIZE = 1 << 14


def can_solve(shifted: Tensor) -> bool:
    """Whether :func:`offsets` and :func:`lines` take these groups (n_groups, group_size)."""
    return (
        shifted.device.type == "cpu"
        and shifted.dtype == torch.float32
        and 0 < shifted.shape[1] <= MAX_GROUP_SIZE
        and native.is_available()
    )


def offsets(
    shifted: Tensor,
    offset: Tensor,
    steps_per_unit: Tensor,
    *,
    max_code: int,
    betas: list[float],
    thresholds: list[float],
    smallest_threshold: float,
    lp_norm: float,
) -> Tensor:
    """Offsets after up to ``len(betas)`` steps of ``mean(q) - mean(shifted) + mean(shrink(residual))``; (n_groups, 1).

    To the bit those of the plain way where the shrink is not at work, as long as a group's codes add up to less than
    ``2**24``; elsewhere the best that was seen, up to rounding.

    Args:
        steps_per_unit: (n_groups, 1), size of a unit of weight in steps: the shrink is in units of weight.
        betas, thresholds: of each step its beta, and the size of a residual up to which its shrink leaves nothing.
        smallest_threshold: no more than the least of these. lp_norm: the exponent of the shrink is one less.
    """
    shifted, offset, steps_per_unit = shifted.contiguous(), offset.contiguous().clone(), steps_per_unit.contiguous()
    mean, of_steps = shifted.mean(1), torch.tensor([betas, thresholds], dtype=torch.float32)
    # Neighbours in a vector take as many steps as the slowest of them: those that the shrink may reach come first.
    may_shrink = (smallest_threshold * steps_per_unit < 0.5).flatten()
    order = torch.cat([may_shrink.nonzero(), (~may_shrink).nonzero()])
    iteration = HQQHalfQuadratic(
        offset=offset.data_ptr(),
        steps_per_unit=steps_per_unit.data_ptr(),
        betas=of_steps[0].data_ptr(),
        thresholds=of_steps[1].data_ptr(),
        order=order.data_ptr(),
        iters=len(betas),
        smallest_threshold=smallest_threshold,
        exponent=lp_norm - 1,
    )
    native.call("ql_hqq_half_quadratic", _groups(shifted, mean, max_code), iteration)
    return offset


def lines(
    shifted: Tensor,
    offset: Tensor,
    other_slope: Tensor,
    other_offset: Tensor,
    *,
    max_code: int,
    iters: int,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """Slopes and offsets of lines fitted to the codes, from slope 1 and ``offset``, or the other start; (n_groups, 1).

    The other one's where its mean squared error is lower by more than ``margin`` times the variance. Up to rounding
    what the plain way finds: a weight halfway between two codes may go to the other.
    """
    shifted, offset = shifted.contiguous(), offset.contiguous().clone()
    other_slope, other_offset = other_slope.contiguous(), other_offset.contiguous()
    slope, mean = torch.empty_like(offset), shifted.mean(1)
    fit = HQQAffineFit(
        slope=slope.data_ptr(),
        offset=offset.data_ptr(),
        other_slope=other_slope.data_ptr(),
        other_offset=other_offset.data_ptr(),
        iters=iters,
        margin=margin,
    )
    native.call("ql_hqq_affine_fit", _groups(shifted, mean, max_code), fit)
    return slope, offset


def _groups(shifted: Tensor, mean: Tensor, max_code: int) -> HQQGroups:
    n_groups, group_size = shifted.shape
    return HQQGroups(
        values=shifted.data_ptr(),
        mean=mean.data_ptr(),
        n_groups=n_groups,
        group_size=group_size,
        max_code=max_code,
        centre=max_code // 2,
    )
