"""In which dtype scales and zeros are stored: 8 bits, the spec's, or float32 where those cannot hold them."""

import dataclasses
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ...formats import QuantizedWeight
from .double_quant import PARTS, from_eight_bits, in_eight_bits
from .spec import HQQSpec


def parts_of(weight: QuantizedWeight) -> tuple[HQQSpec, tuple[Tensor, Tensor, Tensor]]:
    """The spec; and packed codes, and scales and zeros as :func:`metadata_of` gives them."""
    spec = cast(HQQSpec, weight.spec)
    return spec, (weight.tensors["W_q"], *metadata_of(spec, weight.tensors))


def metadata_of(spec: HQQSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and zeros in the spec's dtype, (..., n_rows, n_groups) each; symmetric zeros are not stored."""
    scale = from_eight_bits(tensors, "scale") if spec.double_quant else tensors["scale"]
    if spec.symmetric:
        return scale, torch.full_like(scale, spec.symmetric_zero)
    return scale, from_eight_bits(tensors, "zero") if spec.double_quant else tensors["zero"]


def with_metadata(weight: QuantizedWeight, spec: HQQSpec, scale: Tensor, zero: Tensor) -> QuantizedWeight:
    """The codes of ``weight`` with these scales and zeros, float32, in the first of the dtypes that holds them.

    Those are 8 bits if ``spec`` says so, its ``scale_dtype``, and float32.

    Raises:
        ValueError: none does that ``spec`` may have.
    """
    for stored_as in spec.stored_forms():
        dtype, tensors = getattr(torch, stored_as.scale_dtype), {"W_q": weight.tensors["W_q"]}
        for name, values in zip(PARTS[: 1 if spec.symmetric else 2], (scale, zero), strict=False):
            tensors |= in_eight_bits(values, name, dtype) if stored_as.double_quant else {name: values.to(dtype)}
        is_held = _can_store_in_eight_bits if stored_as.double_quant else can_store
        if is_held(scale, zero, *metadata_of(stored_as, tensors), spec.max_code):
            return dataclasses.replace(weight, spec=stored_as, tensors=tensors)
    raise too_narrow(spec)


def too_narrow(spec: HQQSpec) -> ValueError:
    """The error where no dtype that ``spec`` may have holds the metadata."""
    return ValueError(
        f"{spec.scale_dtype} cannot hold the scales and zeros of this weight (very small or very large weights, or a "
        f"large common offset), and export_target={spec.export_target!r} has no wider ones."
    )


def can_store(scale: Tensor, zero: Tensor, stored_scale: Tensor, stored_zero: Tensor, max_code: int) -> bool:
    """Whether rounding the metadata moves no weight by more than an eighth of a step, or by the dtype's resolution.

    The error of a weight, in steps, is the error of the zero plus the relative error of the scale times the distance
    from the zero. Both are at most half an epsilon of ``max_code`` if the zero lies among the codes. So only a large
    common offset, or a scale out of the dtype's range, cannot be stored.
    """
    zero_error = (stored_zero.float() - zero).abs()
    distance = torch.maximum(zero.abs(), (max_code - zero).abs())
    scale_error = (stored_scale.float() / scale - 1).abs() * distance
    allowed = max(0.125, 0.75 * max_code * torch.finfo(stored_scale.dtype).eps)
    return bool(((zero_error + scale_error) <= allowed).all())


def _can_store_in_eight_bits(
    scale: Tensor, zero: Tensor, stored_scale: Tensor, stored_zero: Tensor, max_code: int
) -> bool:
    """Whether rounding the metadata adds little to the squared error that rounding to codes makes anyway.

    That is a twelfth of a squared step. 3 % of it may be added on average, and half of it in any row: one group of
    another size of numbers would spoil the other groups of its row.
    """
    distance = torch.maximum(zero.abs(), (max_code - zero).abs()) / 2  # of a weight from the zero, about
    moved = (stored_zero.float() - zero).abs()
    moved += (stored_scale.float() - scale).abs() / scale.abs().clamp(min=1e-30) * distance
    rows = moved.square().clamp(max=1).mean(-1)
    return bool(rows.mean() <= 0.03 / 12) and bool(rows.max() <= 0.5 / 12)
