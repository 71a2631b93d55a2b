"""HQQ's solver on a CPU with the compiled kernels, one group in each vector lane. See ``csrc/hqq_solve.h``.

The functions have the names and arguments of those in ``solve_reference.py``.
"""

import torch
from torch import Tensor

from .. import native
from ..interface import HQQAffineFit, HQQGroups, HQQHalfQuadratic
from .solve_reference import HalfQuadraticOptions, betas_of, smallest_threshold_of, threshold_of

# A worker holds 16 groups, 1 MiB of them at this size.
MAX_GROUP_SIZE = 1 << 14


def can_solve(shifted: Tensor) -> bool:
    """Whether the functions here take these groups (n_groups, group_size)."""
    return (
        shifted.device.type == "cpu"
        and shifted.dtype == torch.float32
        and 0 < shifted.shape[1] <= MAX_GROUP_SIZE
        and native.is_available()
    )


def half_quadratic_offset(
    shifted: Tensor, offset: Tensor, steps_per_unit: Tensor, *, max_code: int, options: HalfQuadraticOptions
) -> Tensor:
    """As the reference: to the bit without shrink, if a group's codes add up to less than ``2**24``.

    With the shrink at work, the best offset that was evaluated, up to rounding.
    """
    betas, smallest_threshold = betas_of(options), smallest_threshold_of(options)
    thresholds = [threshold_of(beta, options) for beta in betas]
    shifted, offset, steps_per_unit = shifted.contiguous(), offset.contiguous().clone(), steps_per_unit.contiguous()
    mean, of_iterations = shifted.mean(1), shifted.new_tensor([betas, thresholds])
    # Groups in one vector take as many iterations as the slowest of them: those that the shrink may reach come first.
    may_shrink = (smallest_threshold * steps_per_unit < 0.5).flatten()
    order = torch.cat([may_shrink.nonzero(), (~may_shrink).nonzero()])
    iteration = HQQHalfQuadratic(
        offset=offset.data_ptr(),
        steps_per_unit=steps_per_unit.data_ptr(),
        betas=of_iterations[0].data_ptr(),
        thresholds=of_iterations[1].data_ptr(),
        order=order.data_ptr(),
        iters=len(betas),
        smallest_threshold=smallest_threshold,
        exponent=options.lp_norm - 1,
    )
    native.call("ql_hqq_half_quadratic", _groups(shifted, mean, max_code), iteration)
    return offset


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
    """As the reference, up to rounding: a value halfway between two codes may get the other one."""
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
