"""Scales and zeros of an HQQ weight in 8 bits each, with a step and an offset for each row (double quantization).

A scale is ``code * step + offset``, rounded to the dtype that scales have without this; so is a zero. The weight is
then exactly one with plain scales and zeros, which is what kernels compute with and exports write.

Source: Dettmers et al. 2023 (QLoRA) and the ``hqq`` package store metadata in 8 bits too, in groups of their own that
run across rows. A row's own step and offset leave rows independent, as tiles and stacks of weights need them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MAX_CODE = 255
PARTS = ("scale", "zero")


def in_eight_bits(values: Tensor, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """``values`` (..., out_features, n_groups), float32, as the tensors ``name``, ``name_step`` and ``name_offset``.

    Codes are uint8 of that shape; steps and offsets (..., out_features, 1) in ``dtype``.
    """
    low, high = values.aminmax(dim=-1, keepdim=True)
    step, offset = ((high - low) / MAX_CODE).to(dtype), low.to(dtype)
    codes = ((values - offset.float()) / step.float().clamp(min=1e-30)).round_().clamp_(0, MAX_CODE)
    return {name: codes.to(torch.uint8), f"{name}_step": step, f"{name}_offset": offset}


def from_eight_bits(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The values that :func:`in_eight_bits` has stored, in the dtype of the steps, differentiable in these."""
    step, offset = tensors[f"{name}_step"], tensors[f"{name}_offset"]
    return (tensors[name] * step.float() + offset.float()).to(step.dtype)
