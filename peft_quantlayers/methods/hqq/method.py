"""HQQ: the method that makes and reads HQQ weights."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from quantlayers_kernels import hqq
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq import experts, hqq_dequantize
from quantlayers_kernels.hqq.cpu import prepared
from quantlayers_kernels.hqq.solve import HalfQuadraticOptions, encode, solve_groups
from quantlayers_kernels.hqq.solve_whole_zeros import solve_whole_zeros
from quantlayers_kernels.hqq.tiles import weight_tiles
from quantlayers_kernels.hqq.update import updated_codes, updated_tiles
from quantlayers_kernels.prepared import PreparedProduct
from quantlayers_kernels.tiled import WeightTiles

from ...formats import QuantizedWeight, TensorLayout
from ..base import DeltaRows, InitialCodes, QuantMethod, checked_hessian, checked_layout, refuse_not_finite
from ..registry import register_method
from .double_quant import PARTS, from_eight_bits, in_eight_bits
from .output_solver import Grid, descended_codes, feedback_start, fitted_grid, weighted_grid, weighted_whole_grid
from .spec import HQQSpec

# A million float32 weights and two buffers of that size stay within the last-level cache; other devices want
# large launches, and 2**26 weights make a workspace of less than 1 GiB.
CPU_CHUNK_WEIGHTS = 1 << 20
DEVICE_CHUNK_WEIGHTS = 1 << 26
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
        initial = _solved(weight, spec, layout) if start is None else start
        if hessian is not None:
            hessian = checked_hessian(hessian, weight)
            if iterations is None:
                iterations = CALIBRATED_ITERATIONS if spec.zeros == "float" else WHOLE_ZERO_ITERATIONS
            begin: InitialCodes | None = initial_codes if start is None else None
            return _for_outputs(weight.float(), initial, hessian, begin=begin, iterations=iterations)
        return _on_grid_of(initial, weight) if start is not None else initial

    def can_use_hessian(self, spec: HQQSpec) -> bool:
        return spec.axis == 1

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        spec, (W_q, scale, zero) = _parts(weight)
        return hqq_dequantize(W_q, scale, zero, spec.nbits, spec.axis, weight.in_features, dtype)

    def weight_tiles(self, weight: QuantizedWeight, *, dtype: torch.dtype) -> WeightTiles:
        spec, (W_q, scale, zero) = _parts(weight)
        return weight_tiles(
            W_q, scale, zero, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features, dtype=dtype
        )

    def merged(self, weight: QuantizedWeight, delta: DeltaRows) -> QuantizedWeight:
        """As :meth:`QuantMethod.merged`: scales and zeros stay, and the delta is rounded into the codes with dither.

        The rounding is defined in ``quantlayers_kernels.hqq.update``.
        """
        spec, (W_q, scale, _) = _parts(weight)
        codes = updated_codes(W_q, scale, delta, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features)
        return dataclasses.replace(weight, tensors=weight.tensors | {"W_q": codes})

    def merged_tiles(self, weight: QuantizedWeight, delta: DeltaRows, *, dtype: torch.dtype) -> WeightTiles:
        spec, (W_q, scale, zero) = _parts(weight)
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
        spec, (_, scale, zero) = _parts(weight)
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
            _, (codes, scale, zero) = _parts(weight)
            return hqq.linear(x, codes, scale, zero, bias, spec.nbits, spec.axis, activation_bits)
        tensors = weight.tensors
        codes, scale, zero = tensors["W_q"], tensors["scale"], tensors["zero"]
        return hqq.linear(x, codes, scale, zero, bias, spec.nbits, spec.axis, activation_bits)

    def with_plain_metadata(self, weight: QuantizedWeight) -> QuantizedWeight:
        """As :meth:`QuantMethod.with_plain_metadata`: scales and zeros in the dtype of the spec instead of 8 bits."""
        spec, (W_q, scale, zero) = _parts(weight)
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
        spec, parts = _parts(weight)
        if not experts.can_use(x, *parts, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features):
            return super().experts_linear(x, weight, counts)
        return experts.linear(x, *parts, counts, nbits=spec.nbits)

    def experts_input_gradient(self, grad: Tensor, weight: QuantizedWeight, counts: Sequence[int]) -> Tensor:
        spec, parts = _parts(weight)
        if not experts.can_use(grad, *parts, nbits=spec.nbits, axis=spec.axis, in_features=weight.in_features):
            return super().experts_input_gradient(grad, weight, counts)
        return experts.input_gradient(grad, *parts, counts, nbits=spec.nbits, in_features=weight.in_features)


def _parts(weight: QuantizedWeight) -> tuple[HQQSpec, tuple[Tensor, Tensor, Tensor]]:
    spec = cast(HQQSpec, weight.spec)
    return spec, (weight.tensors["W_q"], *_metadata(spec, weight.tensors))


def _metadata(spec: HQQSpec, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Scales and zeros in the spec's dtype, (..., n_rows, n_groups) each; symmetric zeros are not stored."""
    scale = from_eight_bits(tensors, "scale") if spec.double_quant else tensors["scale"]
    if spec.symmetric:
        return scale, torch.full_like(scale, spec.symmetric_zero)
    return scale, from_eight_bits(tensors, "zero") if spec.double_quant else tensors["zero"]


def _solved(weight: Tensor, spec: HQQSpec, layout: dict[str, TensorLayout]) -> QuantizedWeight:
    """The published iteration; scales and zeros have the spec's dtype, or float32 if that cannot hold them."""
    if spec.double_quant:
        return _solved_in_eight_bits(weight, spec)
    for stored_as in dict.fromkeys((spec, spec.widened())):
        solved = _solved_in_dtype(weight, stored_as, layout)
        if solved is not None:
            return solved
    raise _too_narrow(spec)


def _solved_in_eight_bits(weight: Tensor, spec: HQQSpec) -> QuantizedWeight:
    """The published iteration, and the nearest codes for the scales and zeros as they are stored."""
    exact = spec.with_plain_metadata().widened()
    solved = _solved_in_dtype(weight, exact, exact.tensor_layout(*weight.shape))
    if solved is None:
        raise _too_narrow(spec)
    stored = _with_metadata(solved, spec, *_metadata(exact, solved.tensors))
    return _on_grid_of(stored, weight)


def _too_narrow(spec: HQQSpec) -> ValueError:
    return ValueError(
        f"{spec.scale_dtype} cannot hold the scales and zeros of this weight (very small or very large weights, or a "
        f"large common offset), and export_target={spec.export_target!r} has no wider ones."
    )


def _solved_in_dtype(weight: Tensor, spec: HQQSpec, layout: dict[str, TensorLayout]) -> QuantizedWeight | None:
    out_features, in_features = weight.shape
    n_per_group = weight.numel() // math.prod(layout["scale"].shape)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(layout["scale"].shape, dtype=torch.float32, device=weight.device)
    zero = torch.empty_like(scale)
    dtype = getattr(torch, spec.scale_dtype)
    options = HalfQuadraticOptions(iters=spec.iters, lp_norm=spec.lp_norm, beta=spec.beta, kappa=spec.kappa)

    weight_groups, code_groups = (_by_group(part, spec.axis, n_per_group) for part in (weight, codes))
    flat_scale, flat_zero = scale.view(-1, 1), zero.view(-1, 1)
    chunk = CPU_CHUNK_WEIGHTS if weight.device.type == "cpu" else DEVICE_CHUNK_WEIGHTS
    step = max(1, chunk // n_per_group)
    for start in range(0, weight_groups.shape[0], step):
        part = slice(start, start + step)
        groups = weight_groups[part].to(torch.float32).contiguous()
        if not torch.isfinite(groups.sum()):  # cheaper than looking at each; the sum of large ones overflows too
            refuse_not_finite(groups)
        if spec.zeros == "float":
            group_scale, group_zero = solve_groups(
                groups,
                nbits=spec.nbits,
                options=options,
                round_zero=spec.round_zero,
                refine_scale=spec.refine_scale,
            )
        else:
            group_scale, group_zero = solve_whole_zeros(groups, nbits=spec.nbits, is_symmetric=spec.symmetric)
        if dtype != torch.float32:
            stored_scale, stored_zero = group_scale.to(dtype), group_zero.to(dtype)
            if not _can_store(group_scale, group_zero, stored_scale, stored_zero, spec.max_code):
                return None
            group_scale, group_zero = stored_scale.float(), stored_zero.float()
        flat_scale[part], flat_zero[part] = group_scale, group_zero
        code_groups[part] = encode(groups, group_scale, group_zero, max_code=spec.max_code).to(torch.uint8)
    tensors = {"W_q": pack(codes, spec.nbits), "scale": scale.to(dtype)}
    if not spec.symmetric:
        tensors["zero"] = zero.to(dtype)
    return QuantizedWeight(spec=spec, out_features=out_features, in_features=in_features, tensors=tensors)


def _with_metadata(weight: QuantizedWeight, spec: HQQSpec, scale: Tensor, zero: Tensor) -> QuantizedWeight:
    """The codes of ``weight`` with these scales and zeros, float32, in the first of the dtypes that holds them.

    Those are 8 bits if ``spec`` says so, its ``scale_dtype``, and float32.

    Raises:
        ValueError: none does that ``spec`` may have.
    """
    for stored_as in spec.stored_forms():
        dtype, tensors = getattr(torch, stored_as.scale_dtype), {"W_q": weight.tensors["W_q"]}
        for name, values in zip(PARTS[: 1 if spec.symmetric else 2], (scale, zero), strict=False):
            tensors |= in_eight_bits(values, name, dtype) if stored_as.double_quant else {name: values.to(dtype)}
        can_store = _can_store_in_eight_bits if stored_as.double_quant else _can_store
        if can_store(scale, zero, *_metadata(stored_as, tensors), spec.max_code):
            return dataclasses.replace(weight, spec=stored_as, tensors=tensors)
    raise _too_narrow(spec)


def _on_grid_of(start: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """``weight`` with the scales and zeros of ``start``, and the codes that are nearest on that grid."""
    spec, (_, *grid) = _parts(start)
    scale, zero = (part.to(weight.device) for part in grid)
    groups = _by_group(weight.float(), spec.axis, weight.numel() // scale.numel())
    flat = (scale.float().reshape(-1, 1), zero.float().reshape(-1, 1))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    _by_group(codes, spec.axis, groups.shape[1]).copy_(encode(groups, *flat, max_code=spec.max_code))
    tensors = {name: tensor.to(weight.device, copy=True) for name, tensor in start.tensors.items() if name != "W_q"}
    return dataclasses.replace(start, tensors={"W_q": pack(codes, spec.nbits)} | tensors)


# Sweeps over the codes and a fit of the grid, in turn; twice as many lower the held-out error by 2 %.
CALIBRATED_ITERATIONS = 2
# Without float zeros the same gives 4 %, and the square root of the Hessian's diagonal for the first grid 4 % more.
WHOLE_ZERO_ITERATIONS = 4
SWEEPS_PER_ITERATION = 3


def _for_outputs(
    weight: Tensor, initial: QuantizedWeight, hessian: Tensor, *, begin: InitialCodes | None, iterations: int
) -> QuantizedWeight:
    """``weight``, float32, quantized with a low output error, starting from the grid of ``initial``.

    Zero points that are not float do not change in the iterations. The grid is first fitted with the Hessian's
    diagonal as weights, and ``begin`` says which codes the first sweep starts from; with None it starts from the grid
    and the codes of ``initial``.
    """
    spec, (_, *stored) = _parts(initial)
    scale, zero = (part.to(weight.device).float() for part in stored)
    groups = weight.view(*scale.shape, -1)
    grid = Grid(scale, zero, max_code=spec.max_code)
    if begin is None:
        codes = initial.codes().to(weight.device).float().view(groups.shape)
    else:
        importance, plain = hessian.diagonal().view(groups.shape[1:]), grid
        if spec.zeros == "float":
            grid = weighted_grid(groups, grid, importance)
        else:
            grid = weighted_whole_grid(groups, importance, nbits=spec.nbits, is_symmetric=spec.symmetric)
        if begin == "nearest":
            codes = grid.nearest_codes(groups)
        else:
            codes, grid = feedback_start(groups, [grid, plain], hessian, act_order=begin == "act_order")
    for _ in range(iterations):
        codes = descended_codes(groups, codes, grid, hessian, sweeps=SWEEPS_PER_ITERATION)
        grid = fitted_grid(groups, codes, grid, hessian, keeps_zeros=spec.zeros != "float")
    found = _with_metadata(initial, spec, grid.scale, grid.zero)
    _, (_, scale, zero) = _parts(found)
    grid = Grid(scale.float(), zero.float(), grid.max_code)
    codes = descended_codes(groups, codes, grid, hessian, sweeps=1).view(weight.shape).to(torch.uint8)
    return dataclasses.replace(found, tensors=found.tensors | {"W_q": pack(codes, spec.nbits)})


def _by_group(matrix: Tensor, axis: int, n_per_group: int) -> Tensor:
    """View of ``matrix`` (out_features, in_features) as (n_groups, n_per_group), in the order of ``scale``."""
    if axis == 1:
        return matrix.reshape(-1, n_per_group)
    return matrix.reshape(n_per_group, -1).t()


def _can_store(scale: Tensor, zero: Tensor, stored_scale: Tensor, stored_zero: Tensor, max_code: int) -> bool:
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


register_method(HQQMethod())
