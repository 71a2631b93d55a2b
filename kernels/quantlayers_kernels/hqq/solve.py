"""Zeros and scales of HQQ groups with the compiled kernels, one group in each lane. See ``csrc/hqq_solve.h``.

The definition, and the way where the kernels are not there, is ``peft_quantlayers/quantizers/_hqq_solver.py``, whose
names these are. Groups are shifted to start at 0 and scaled to a step of 1.
"""

import torch
from torch import Tensor

from .. import native

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


def offsets(shifted: Tensor, offset: Tensor, limit: Tensor, *, max_code: int, iters: int) -> Tensor:
    """Offsets after up to ``iters`` steps of ``mean(q) - mean(shifted)``; (n_groups, 1).

    NaN for a group in which the largest residual has been over ``limit`` (n_groups, 1), so that it shrinks. Others are
    to the bit those of the plain way, as long as a group's codes add up to less than ``2**24``.
    """
    shifted, offset, limit = shifted.contiguous(), offset.contiguous().clone(), limit.contiguous()
    mean = shifted.mean(1)
    native.call(
        "ql_hqq_offsets",
        *(offset.data_ptr(), shifted.data_ptr(), mean.data_ptr(), limit.data_ptr()),
        *(*shifted.shape, iters, max_code),
    )
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
    slope, mean, one_margin = torch.empty_like(offset), shifted.mean(1), torch.tensor([margin])
    native.call(
        "ql_hqq_lines",
        *(slope.data_ptr(), offset.data_ptr(), shifted.data_ptr(), mean.data_ptr()),
        *(other_slope.data_ptr(), other_offset.data_ptr(), one_margin.data_ptr()),
        *(*shifted.shape, iters, max_code),
    )
    return slope, offset
