"""Rotated HQQ: HQQ in a rotated basis of a layer's inputs, which are rotated on the way in.

Rotations before the quantizer (``transforms``) are folded into the weights around a layer, which not every place
has: the inputs of an MLP's last layer come out of a nonlinearity. Here the layer itself rotates them, which spreads
outliers over all channels, of the weight and of the inputs that :func:`.set_activation_bits` rounds. To everything
outside, the layer's weight is the one before the rotation: adapters, merges and ``layer.weight`` know of none.

Source: Ashkboos et al. 2024, "QuaRot", which calls rotations before the down projection R4.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from quantlayers_kernels.hadamard import MIN_BLOCK, rotate, rotate_back, rotation_block
from quantlayers_kernels.prepared import PreparedProduct
from quantlayers_kernels.straight_through import straight_through_linear
from quantlayers_kernels.tiled import WeightTiles

from ..arguments import check_flag
from ..formats import QuantizedWeight, TensorLayout
from .base import DeltaRows, InitialCodes, QuantMethod, checked_hessian, checked_layout, refuse_not_finite
from .hqq import HQQMethod, HQQSpec
from .quant_config import make_config
from .registry import register_method


@dataclass(frozen=True, kw_only=True)
class RotatedHQQSpec(HQQSpec):
    """An HQQ weight of rotated inputs.

    Fields: those of :class:`HQQSpec`, of which ``axis`` is 1 and ``export_target`` None, and
        rotate_inputs: False for a layer as with plain HQQ, beside others that are rotated. A layer whose number of
            inputs is no multiple of 4 gets it by itself, as other misfits get smaller groups.
    """

    method = "rotated_hqq"
    shown_fields = ("nbits", "group_size", "rotate_inputs")

    rotate_inputs: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("rotate_inputs", self.rotate_inputs)
        if self.axis != 1:
            raise ValueError("rotated weights need groups along the inputs: leave axis=1.")
        if self.export_target is not None:
            raise ValueError(
                f"export_target={self.export_target!r} holds no weights of rotated inputs: leave it out, or quantize "
                "with HQQConfig."
            )

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        layout = super().tensor_layout(out_features, in_features)
        if self.rotate_inputs and not rotation_block(in_features):
            raise ValueError(
                f"in_features={in_features} is not a multiple of {MIN_BLOCK}, so no Hadamard matrix rotates such "
                "inputs. Use rotate_inputs=False for this layer."
            )
        return layout

    def fitted(self, out_features: int, in_features: int) -> Self | None:
        if self.rotate_inputs and not rotation_block(in_features):
            return dataclasses.replace(self, rotate_inputs=False).fitted(out_features, in_features)
        return super().fitted(out_features, in_features)


RotatedHQQConfig = make_config(RotatedHQQSpec)


class RotatedHQQMethod(HQQMethod):
    """HQQ of ``W @ Q`` for inputs ``x @ Q``; ``Q`` is that of :func:`quantlayers_kernels.hadamard.rotate`."""

    spec_type = RotatedHQQSpec

    def quantize(
        self,
        weight: Tensor,
        spec: Any,
        *,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        iterations: int | None = None,
        initial_codes: InitialCodes = "nearest",
    ) -> QuantizedWeight:
        """As :meth:`HQQMethod.quantize`."""
        checked_layout(weight, spec)
        if spec.rotate_inputs:
            weight = weight.detach().float()
            refuse_not_finite(weight)
            weight = rotate(weight)
            if hessian is not None:
                hessian = rotate(rotate(checked_hessian(hessian, weight)).t())
        return super().quantize(
            weight, spec, hessian=hessian, start=start, iterations=iterations, initial_codes=initial_codes
        )

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        if not _is_rotated(weight):
            return super().dequantize(weight, dtype=dtype)
        return rotate_back(super().dequantize(weight)).to(dtype)

    def weight_tiles(self, weight: QuantizedWeight, *, dtype: torch.dtype) -> WeightTiles:
        if not _is_rotated(weight):
            return super().weight_tiles(weight, dtype=dtype)
        return _rotated_back(super().weight_tiles(weight, dtype=torch.float32), dtype)

    def merged(self, weight: QuantizedWeight, delta: DeltaRows) -> QuantizedWeight:
        return super().merged(weight, partial(_rotated_rows, delta) if _is_rotated(weight) else delta)

    def merged_tiles(self, weight: QuantizedWeight, delta: DeltaRows, *, dtype: torch.dtype) -> WeightTiles:
        if not _is_rotated(weight):
            return super().merged_tiles(weight, delta, dtype=dtype)
        tiles = super().merged_tiles(weight, partial(_rotated_rows, delta), dtype=torch.float32)
        return _rotated_back(tiles, dtype)

    def merged_linear(
        self, x: Tensor, weight: QuantizedWeight, left: Tensor, right: Tensor, bias: Tensor | None
    ) -> Tensor:
        """As :meth:`QuantMethod.merged_linear`: in the stored basis, as the product of the merged weight is."""
        if not _is_rotated(weight):
            return super().merged_linear(x, weight, left, right, bias)

        def tiles(left: Tensor, right: Tensor, dtype: torch.dtype) -> WeightTiles:
            return HQQMethod.merged_tiles(self, weight, lambda rows: rotate(left[rows] @ right), dtype=dtype)

        return straight_through_linear(rotate(x), left, right, bias, weight.out_features, tiles, input_of_factors=x)

    def group_delta_size(self, spec: Any, *, in_features: int) -> int:
        if spec.rotate_inputs:
            raise NotImplementedError(
                "a delta that is constant in groups of inputs is not so in those of rotated_hqq weights, whose inputs "
                "are rotated. Quantize with HQQConfig."
            )
        return super().group_delta_size(spec, in_features=in_features)

    def linear(
        self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        """As :meth:`HQQMethod.linear`; rounds the rotated activations."""
        return super().linear(rotate(x) if _is_rotated(weight) else x, weight, bias, activation_bits=activation_bits)

    def prepared_product(
        self, weight: QuantizedWeight, *, activation_bits: int | None = None
    ) -> PreparedProduct | None:
        return None if _is_rotated(weight) else super().prepared_product(weight, activation_bits=activation_bits)

    def experts_linear(self, x: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        method = QuantMethod if _is_rotated(weight) else HQQMethod  # whose kernel for all experts would not rotate
        return method.experts_linear(self, x, weight, counts)

    def experts_input_gradient(self, grad: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        method = QuantMethod if _is_rotated(weight) else HQQMethod
        return method.experts_input_gradient(self, grad, weight, counts)


def _is_rotated(weight: QuantizedWeight) -> bool:
    return weight.spec.rotate_inputs  # type: ignore[attr-defined, no-any-return]  # of a RotatedHQQSpec


def _rotated_rows(delta: DeltaRows, rows: slice) -> Tensor:
    return rotate(delta(rows))


def _rotated_back(tiles: WeightTiles, dtype: torch.dtype) -> WeightTiles:
    for rows, tile in tiles:
        yield rows, rotate_back(tile).to(dtype)


register_method(RotatedHQQMethod())
