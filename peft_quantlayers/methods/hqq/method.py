"""HQQ: the method that makes and reads HQQ weights."""

import dataclasses
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from quantlayers_kernels import hqq
from quantlayers_kernels.hqq import experts, hqq_dequantize
from quantlayers_kernels.hqq.cpu import prepared
from quantlayers_kernels.hqq.tiles import weight_tiles
from quantlayers_kernels.hqq.update import updated_codes, updated_tiles
from quantlayers_kernels.prepared import PreparedProduct
from quantlayers_kernels.tiled import WeightTiles

from ...formats import QuantizedWeight
from ..base import DeltaRows, InitialCodes, QuantMethod, checked_hessian, checked_layout, refuse_not_finite
from ..registry import register_method
from .fitted_weight import CALIBRATED_ITERATIONS, WHOLE_ZERO_ITERATIONS, on_grid_of, solved, with_low_output_error
from .spec import HQQSpec
from .stored_metadata import parts_of

# Fraction of a group delta, by norm, that rounding the zeros may lose. The outputs' divergence scales with its square.
MAX_DELTA_LOST = 1e-2
# The same where the format of an export target has no wider zeros. Rounding a float16 zero moves it by 0.004 steps at
# most, which is nothing next to the half step of a code; this bound is for deltas that would mostly vanish.
MAX_DELTA_LOST_FOR_TARGET = 0.25


class HQQMethod(QuantMethod[HQQSpec]):
    """Half-Quadratic Quantization. Source: Badri & Shaji 2023; the solver is ``quantlayers_kernels.hqq.solve``."""

    spec_type = HQQSpec
    has_independent_rows = True  # as far as its groups lie along the inputs
    initial_codes = ("nearest", "error_feedback", "act_order")
    calibration_requirement = "Calibrated HQQ needs groups along the inputs: quantize with axis=1."

    def quantize(
        self,
        weight: Tensor,
        spec: HQQSpec,
        *,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        iterations: int | None = None,
        initial_codes: InitialCodes = "nearest",
    ) -> QuantizedWeight:
        """As :meth:`QuantMethod.quantize`.

        With ``start`` alone, its scales and zeros stay, and only the codes are new. With ``hessian`` the fit starts
        from them. Calibrated weights need groups along the inputs: NotImplementedError for ``axis=0``.
        """
        layout = checked_layout(weight, spec)
        weight = weight.detach()
        if hessian is not None and not self.can_use_hessian(spec):
            raise NotImplementedError(f"{self.calibration_requirement} Or quantize without calibration.")
        if start is not None:
            refuse_not_finite(weight)
        initial = solved(weight, spec, layout) if start is None else start
        if hessian is not None:
            hessian = checked_hessian(hessian, weight)
            if iterations is None:
                iterations = CALIBRATED_ITERATIONS if spec.zeros == "float" else WHOLE_ZERO_ITERATIONS
            begin: InitialCodes | None = initial_codes if start is None else None
            return with_low_output_error(weight.float(), initial, hessian, begin=begin, iterations=iterations)
        return on_grid_of(initial, weight) if start is not None else initial

    def can_use_hessian(self, spec: HQQSpec) -> bool:
        return spec.axis == 1

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        spec, (W_q, scale, zero) = parts_of(weight)
        return hqq_dequantize(W_q, scale, zero, spec.nbits, spec.axis, weight.in_features, dtype)

    def weight_tiles(self, weight: QuantizedWeight, *, dtype: torch.dtype) -> WeightTiles:
        spec, (W_q, scale, zero) = parts_of(weight)
        return weight_tiles(
            W_q, scale, zero, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features, dtype=dtype
        )

    def merged(self, weight: QuantizedWeight, delta: DeltaRows) -> QuantizedWeight:
        """As :meth:`QuantMethod.merged`: scales and zeros stay, and the delta is rounded into the codes with dither.

        The rounding is defined in ``quantlayers_kernels.hqq.update``.
        """
        spec, (W_q, scale, _) = parts_of(weight)
        codes = updated_codes(W_q, scale, delta, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features)
        return dataclasses.replace(weight, tensors=weight.tensors | {"W_q": codes})

    def merged_tiles(self, weight: QuantizedWeight, delta: DeltaRows, *, dtype: torch.dtype) -> WeightTiles:
        spec, (W_q, scale, zero) = parts_of(weight)
        return updated_tiles(
            W_q, scale, zero, delta, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features, dtype=dtype
        )

    def group_delta_size(self, spec: HQQSpec, *, in_features: int) -> int:
        if spec.axis != 1:
            raise NotImplementedError("the groups run along the outputs (axis=0). Quantize with axis=1.")
        if spec.double_quant:
            raise NotImplementedError("the zeros are stored in 8 bits. Quantize with double_quant=False.")
        if spec.zeros != "float":
            field = "symmetric" if spec.symmetric else "integer_zero"
            at = f" for an export target that holds float zeros, unlike {spec.export_target!r}"
            raise NotImplementedError(
                f"the zeros are {'fixed' if spec.symmetric else 'integers'}. Quantize with {field}=False"
                f"{at if spec.export_target is not None else ''}."
            )
        return spec.group_size or in_features

    def with_group_delta(self, weight: QuantizedWeight, delta: Tensor) -> QuantizedWeight:
        """As :meth:`QuantMethod.with_group_delta`: ``(code - (zero - delta / scale)) * scale``.

        Zeros and scales become float32 where the zeros' dtype would lose more than ``MAX_DELTA_LOST`` of the delta. An
        ``export_target`` without float32 keeps its dtype, up to ``MAX_DELTA_LOST_FOR_TARGET``; ValueError beyond it.
        """
        spec, (_, scale, zero) = parts_of(weight)
        self.group_delta_size(spec, in_features=weight.in_features)
        scale = scale.float()
        shifted = zero.float() - delta / scale
        if not torch.isfinite(shifted).all():
            raise ValueError("the zeros with the delta folded in hold NaN or Inf. The adapter seems to be broken.")
        stored = shifted.to(zero.dtype)
        lost = ((stored.float() - shifted) * scale).norm() / delta.norm().clamp(min=1e-30)
        wide = spec.widened()
        if lost <= (MAX_DELTA_LOST if wide != spec else MAX_DELTA_LOST_FOR_TARGET):
            return dataclasses.replace(weight, tensors=weight.tensors | {"zero": stored})
        if wide == spec:
            raise ValueError(
                f"zeros in {spec.scale_dtype}, as export_target={spec.export_target!r} stores them, would lose "
                f"{float(lost):.0%} of the delta, which is much smaller than a step. Merge with "
                'strategy="requantize", or quantize for a target that stores zeros in float32, such as "mlx".'
            )
        tensors = weight.tensors | {"scale": scale, "zero": shifted}
        return dataclasses.replace(weight, spec=wide, tensors=tensors)

    def linear(
        self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None, *, activation_bits: int | None = None
    ) -> Tensor:
        """As :meth:`QuantMethod.linear`, with activations rounded to ``activation_bits`` where the kernels do that."""
        spec: Any = weight.spec  # no cast: this is called for every token
        if spec.symmetric or spec.double_quant:
            _, (codes, scale, zero) = parts_of(weight)
            return hqq.linear(x, codes, scale, zero, bias, spec.nbits, spec.axis, activation_bits)
        tensors = weight.tensors
        codes, scale, zero = tensors["W_q"], tensors["scale"], tensors["zero"]
        return hqq.linear(x, codes, scale, zero, bias, spec.nbits, spec.axis, activation_bits)

    def with_plain_metadata(self, weight: QuantizedWeight) -> QuantizedWeight:
        """As :meth:`QuantMethod.with_plain_metadata`: scales and zeros in the dtype of the spec instead of 8 bits."""
        spec, (W_q, scale, zero) = parts_of(weight)
        if not spec.double_quant:
            return weight
        tensors = {"W_q": W_q, "scale": scale} | ({} if spec.symmetric else {"zero": zero})
        return dataclasses.replace(weight, spec=spec.with_plain_metadata(), tensors=tensors)

    def rounding_misfit(self, spec: HQQSpec) -> str | None:
        return None if spec.axis == 1 else "its groups run along the outputs (axis=0)"

    def prepared_product(
        self, weight: QuantizedWeight, *, activation_bits: int | None = None
    ) -> PreparedProduct | None:
        spec, tensors = cast(HQQSpec, weight.spec), weight.tensors
        if spec.symmetric or spec.double_quant:  # the kernel's zeros or scales are made for every call
            return None
        return prepared(
            tensors["W_q"],
            tensors["scale"],
            tensors["zero"],
            nbits=spec.nbits,
            axis=spec.axis,
            in_features=weight.in_features,
            activation_bits=activation_bits,
        )

    def experts_linear(self, x: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        spec, parts = parts_of(weight)
        if not experts.can_use(x, *parts, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features):
            return super().experts_linear(x, weight, counts)
        return experts.linear(x, *parts, counts, nbits=spec.nbits)

    def experts_input_gradient(self, grad: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        spec, parts = parts_of(weight)
        if not experts.can_use(grad, *parts, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features):
            return super().experts_input_gradient(grad, weight, counts)
        return experts.input_gradient(grad, *parts, counts, nbits=spec.nbits, in_features=weight.in_features)


register_method(HQQMethod())
