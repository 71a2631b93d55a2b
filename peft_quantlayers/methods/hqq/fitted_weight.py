"""A float weight on an HQQ grid: by the published iteration, on a grid that is given, or with a low output error."""

import dataclasses
import math

import torch
from torch import Tensor

from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.hqq.solve import HalfQuadraticOptions, encode, solve_groups
from quantlayers_kernels.hqq.solve_whole_zeros import solve_whole_zeros

from ...formats import QuantizedWeight, TensorLayout
from ..base import InitialCodes, refuse_not_finite
from .output_solver import Grid, descended_codes, feedback_start, fitted_grid, weighted_grid, weighted_whole_grid
from .spec import HQQSpec
from .stored_metadata import can_store, metadata_of, parts_of, too_narrow, with_metadata

# A million float32 weights and two buffers of that size stay within the last-level cache; other devices want
# large launches, and 2**26 weights make a workspace of less than 1 GiB.
CPU_CHUNK_WEIGHTS = 1 << 20
DEVICE_CHUNK_WEIGHTS = 1 << 26
# Sweeps over the codes and a fit of the grid, in turn; twice as many lower the held-out error by 2 %.
CALIBRATED_ITERATIONS = 2
# Without float zeros the same gives 4 %, and the square root of the Hessian's diagonal for the first grid 4 % more.
WHOLE_ZERO_ITERATIONS = 4
SWEEPS_PER_ITERATION = 3


def solved(weight: Tensor, spec: HQQSpec, layout: dict[str, TensorLayout]) -> QuantizedWeight:
    """The published iteration; scales and zeros have the spec's dtype, or float32 if that cannot hold them."""
    if spec.double_quant:
        return _solved_in_eight_bits(weight, spec)
    for stored_as in dict.fromkeys((spec, spec.widened())):
        found = _solved_in_dtype(weight, stored_as, layout)
        if found is not None:
            return found
    raise too_narrow(spec)


def _solved_in_eight_bits(weight: Tensor, spec: HQQSpec) -> QuantizedWeight:
    """The published iteration, and the nearest codes for the scales and zeros as they are stored."""
    exact = spec.with_plain_metadata().widened()
    found = _solved_in_dtype(weight, exact, exact.tensor_layout(*weight.shape))
    if found is None:
        raise too_narrow(spec)
    stored = with_metadata(found, spec, *metadata_of(exact, found.tensors))
    return on_grid_of(stored, weight)


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
            if not can_store(group_scale, group_zero, stored_scale, stored_zero, spec.max_code):
                return None
            group_scale, group_zero = stored_scale.float(), stored_zero.float()
        flat_scale[part], flat_zero[part] = group_scale, group_zero
        code_groups[part] = encode(groups, group_scale, group_zero, max_code=spec.max_code).to(torch.uint8)
    tensors = {"W_q": pack(codes, spec.nbits), "scale": scale.to(dtype)}
    if not spec.symmetric:
        tensors["zero"] = zero.to(dtype)
    return QuantizedWeight(spec=spec, out_features=out_features, in_features=in_features, tensors=tensors)


def on_grid_of(start: QuantizedWeight, weight: Tensor) -> QuantizedWeight:
    """``weight`` with the scales and zeros of ``start``, and the codes that are nearest on that grid."""
    spec, (_, *grid) = parts_of(start)
    scale, zero = (part.to(weight.device) for part in grid)
    groups = _by_group(weight.float(), spec.axis, weight.numel() // scale.numel())
    flat = (scale.float().reshape(-1, 1), zero.float().reshape(-1, 1))
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    _by_group(codes, spec.axis, groups.shape[1]).copy_(encode(groups, *flat, max_code=spec.max_code))
    tensors = {name: tensor.to(weight.device, copy=True) for name, tensor in start.tensors.items() if name != "W_q"}
    return dataclasses.replace(start, tensors={"W_q": pack(codes, spec.nbits)} | tensors)


def with_low_output_error(
    weight: Tensor, initial: QuantizedWeight, hessian: Tensor, *, begin: InitialCodes | None, iterations: int
) -> QuantizedWeight:
    """``weight``, float32, quantized with a low output error, starting from the grid of ``initial``.

    Zero points that are not float do not change in the iterations. The grid is first fitted with the Hessian's
    diagonal as weights, and ``begin`` says which codes the first sweep starts from; with None it starts from the grid
    and the codes of ``initial``.
    """
    spec, (_, *stored) = parts_of(initial)
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
    found = with_metadata(initial, spec, grid.scale, grid.zero)
    _, (_, scale, zero) = parts_of(found)
    grid = Grid(scale.float(), zero.float(), grid.max_code)
    codes = descended_codes(groups, codes, grid, hessian, sweeps=1).view(weight.shape).to(torch.uint8)
    return dataclasses.replace(found, tensors=found.tensors | {"W_q": pack(codes, spec.nbits)})


def _by_group(matrix: Tensor, axis: int, n_per_group: int) -> Tensor:
    """View of ``matrix`` (out_features, in_features) as (n_groups, n_per_group), in the order of ``scale``."""
    if axis == 1:
        return matrix.reshape(-1, n_per_group)
    return matrix.reshape(n_per_group, -1).t()
