"""AQLM: the method that makes and reads AQLM weights in the published layout."""

import dataclasses
import logging
from functools import cache

import torch
from torch import Tensor

from quantlayers_kernels import aqlm, native
from quantlayers_kernels.aqlm import aqlm_dequantize
from quantlayers_kernels.aqlm.choice import matrix_to_groups
from quantlayers_kernels.aqlm.tiles import weight_tiles
from quantlayers_kernels.aqlm.update import updated_codes
from quantlayers_kernels.tiled import WeightTiles

from ...formats import QuantizedWeight
from ...formats.quantized_weight import MAX_SCALE_ERROR
from ..base import DeltaRows, QuantMethod, checked_hessian, checked_layout, refuse_not_finite
from ..registry import register_method
from .code_moves import moved_codes
from .solver import (
    Additive,
    Problem,
    extended_solution,
    fitted_codebooks,
    fitted_scales,
    improved_codes,
    initial_solution,
)
from .spec import AQLMSpec

logger = logging.getLogger(__name__)

# Width of the beam search where trying all pairs is too slow.
NARROW_BEAM = 8


class AQLMMethod(QuantMethod[AQLMSpec]):
    """Additive Quantization of Language Models. Source: Egiazarian et al. 2024; the solver is in ``solver.py``.

    Residual k-means, then codebooks, codes and row scales in turn. Deterministic for a given ``spec.seed``.
    """

    spec_type = AQLMSpec
    improves_start = True

    def quantize(
        self,
        weight: Tensor,
        spec: AQLMSpec,
        *,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        iterations: int | None = None,
    ) -> QuantizedWeight:
        """As :meth:`QuantMethod.quantize`; with ``start`` codes, codebooks and scales are refined from there.

        If ``spec`` has more codebooks than ``start``, the additional ones are initialised from the residual.
        """
        checked_layout(weight, spec)
        weight = weight.detach().float().contiguous()
        refuse_not_finite(weight)
        if hessian is not None:
            hessian = checked_hessian(hessian, weight)
        problem = Problem(
            target=matrix_to_groups(weight, spec.out_group_size, spec.in_group_size),
            hessian=hessian,
            out_group=spec.out_group_size,
        )
        num_codebooks, size = spec.num_codebooks, 2**spec.nbits_per_codebook
        generator = torch.Generator().manual_seed(spec.seed)
        if start is None:
            found = initial_solution(problem, num_codebooks=num_codebooks, size=size, generator=generator)
        else:
            found = _floats_of(start.to(weight.device))
            found = extended_solution(problem, found, num_codebooks=num_codebooks, generator=generator)
        beam = spec.beam or _default_beam(spec, weight.device)
        for _ in range(spec.rounds if iterations is None else iterations):
            found = fitted_codebooks(problem, found)
            found = improved_codes(problem, found, beam=beam)
            found = fitted_scales(problem, found)
        return _stored(fitted_codebooks(problem, found), spec, weight.shape)

    def can_use_hessian(self, spec: AQLMSpec) -> bool:
        return True

    def merged(self, weight: QuantizedWeight, delta: DeltaRows) -> QuantizedWeight:
        """As :meth:`QuantMethod.merged`: codebooks and scales stay, and codes move at random by a fixed dither.

        The rule is in ``quantlayers_kernels.aqlm.update``.
        """
        codes = updated_codes(*_parts(weight), delta)
        return dataclasses.replace(weight, tensors=weight.tensors | {"codes": codes})

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return aqlm_dequantize(*_parts(weight), dtype)

    def weight_tiles(self, weight: QuantizedWeight, *, dtype: torch.dtype) -> WeightTiles:
        return weight_tiles(*_parts(weight), dtype=dtype)

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        codes, codebooks, scales = _parts(weight)
        if bias is not None and scales.requires_grad and not codebooks.requires_grad:
            # The gradient of the scales is computed from the product; in half precision a large bias in it would lose
            # their digits.
            return aqlm.linear(x, codes, codebooks, scales, None) + bias.to(x.dtype)
        return aqlm.linear(x, codes, codebooks, scales, bias)


def _parts(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    return weight.tensors["codes"], weight.tensors["codebooks"], weight.tensors["scales"]


def _default_beam(spec: AQLMSpec, device: torch.device) -> int:
    if spec.num_codebooks != 2 or spec.nbits_per_codebook > 8:
        return NARROW_BEAM
    if device.type == "cpu" and not native.is_available():
        _warn_of_narrow_beam()
        return NARROW_BEAM
    return int(2**spec.nbits_per_codebook)


@cache
def _warn_of_narrow_beam() -> None:
    logger.warning(
        "the compiled kernels are missing: AQLM uses a beam of %d instead of trying all pairs of codes, which raises "
        "its error by a few percent. Reinstall with a C compiler, or set beam=256, which takes hours.",
        NARROW_BEAM,
    )


def _floats_of(start: QuantizedWeight) -> Additive:
    _, codebooks, scales = _parts(start)
    return Additive(codes=start.codes(), codebooks=codebooks.float().flatten(2), scales=scales.float().flatten())


def _stored(found: Additive, spec: AQLMSpec, shape: torch.Size) -> QuantizedWeight:
    """``found`` in the dtypes of ``spec``, or of the widened spec if those cannot hold it."""
    layout = spec.tensor_layout(*shape)
    codebooks = found.codebooks.view(layout["codebooks"].shape).to(layout["codebooks"].dtype)
    scales = found.scales.view(layout["scales"].shape).to(layout["scales"].dtype)
    is_lost = (scales.float().flatten() - found.scales).norm() > MAX_SCALE_ERROR * found.scales.norm()
    if is_lost or not (torch.isfinite(codebooks).all() and torch.isfinite(scales).all()):
        if spec.scale_dtype == "float32":
            raise ValueError("the scales or codebooks hold numbers that float32 cannot. Rescale the weight.")
        return _stored(found, spec.widened(), shape)
    return QuantizedWeight(
        spec=spec,
        out_features=shape[0],
        in_features=shape[1],
        tensors={"codes": spec.pack_codes(found.codes), "codebooks": codebooks, "scales": scales},
    )


def move_aqlm_codes(
    weight: QuantizedWeight, gradient: Tensor, *, step: float, max_change: float, trust_ratio: float
) -> tuple[QuantizedWeight, int]:
    """New codes for the groups of an AQLM weight whose gradient is largest.

    Args:
        weight: not changed.
        gradient: of the loss with respect to the weight, (out_features, in_features), float32.
        step, max_change, trust_ratio: as for :func:`.code_moves.moved_codes`.

    Returns:
        The weight with its new codes, and the number of groups that have new ones.
    """
    codes, (_, codebooks, scales) = weight.codes(), _parts(weight)
    moved = moved_codes(
        codes,
        codebooks.float(),
        scales.float().flatten(),
        gradient,
        step=step,
        max_change=max_change,
        trust_ratio=trust_ratio,
    )
    return weight.with_codes(moved), int((moved != codes).any(-1).sum())


register_method(AQLMMethod())
