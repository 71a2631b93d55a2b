"""AQLM: the method that makes and reads AQLM weights in the published layout."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from quantlayers_kernels import native
from quantlayers_kernels.aqlm import aqlm_dequantize, aqlm_linear
from quantlayers_kernels.aqlm.choice import matrix_to_groups
from quantlayers_kernels.aqlm.reference import unsigned_codes, wrapped_codes
from quantlayers_kernels.aqlm.tiles import weight_tiles
from quantlayers_kernels.aqlm.update import updated_codes
from quantlayers_kernels.tiled import WeightTiles

from ...formats import QuantizedWeight
from ..base import QuantMethod, checked_hessian, checked_layout, refuse_not_finite
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

# Choices that are followed where trying all is too slow.
NARROW_BEAM = 8
# Of the scales, in their norm: more than this is lost only where their dtype holds no numbers so small.
MAX_SCALE_ERROR = 0.01


class AQLMMethod(QuantMethod[AQLMSpec]):
    """Additive Quantization of Language Models. Source: Egiazarian et al. 2024; the solver is in ``solver.py``.

    Residual k-means, then codebooks, codes and row scales in turn. Deterministic under ``spec.seed``.
    """

    spec_type = AQLMSpec
    improves_start = True

    def quantize(
        self,
        weight: Tensor,
        spec: AQLMSpec,
        *,
        name: str,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        rounds: int | None = None,
    ) -> QuantizedWeight:
        """As :meth:`QuantMethod.quantize`; with ``start`` codes, codebooks and scales are improved from there.

        Where ``spec`` has more codebooks than ``start``, they begin with what that leaves over.
        """
        checked_layout(weight, spec, name=name)
        weight = weight.detach().float().contiguous()
        refuse_not_finite(weight, name=name)
        if hessian is not None:
            hessian = checked_hessian(hessian, weight, name=name)
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
            found = _floats_of(start, weight.device)
            found = extended_solution(problem, found, num_codebooks=num_codebooks, generator=generator)
        beam = spec.beam or _default_beam(spec, weight.device)
        for _ in range(spec.rounds if rounds is None else rounds):
            found = fitted_codebooks(problem, found)
            found = improved_codes(problem, found, beam=beam)
            found = fitted_scales(problem, found)
        return _stored(fitted_codebooks(problem, found), spec, weight.shape, name=name)

    def can_use_hessian(self, spec: AQLMSpec) -> bool:
        return True

    def merged(self, weight: QuantizedWeight, change: Callable[[slice], Tensor], *, name: str) -> QuantizedWeight:
        """As :meth:`QuantMethod.merged`: codebooks and scales stay, and codes move with a probability.

        The rule is in ``quantlayers_kernels.aqlm.update``.
        """
        codes, codebooks, scales = (weight.tensors[part] for part in ("codes", "codebooks", "scales"))
        codes = updated_codes(codes, codebooks, scales, change)
        return dataclasses.replace(weight, tensors=weight.tensors | {"codes": codes})

    def dequantize(
        self, tensors: Mapping[str, Tensor], spec: AQLMSpec, *, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        return aqlm_dequantize(tensors["codes"], tensors["codebooks"], tensors["scales"], dtype)

    def weight_tiles(
        self, tensors: Mapping[str, Tensor], spec: AQLMSpec, *, in_features: int, dtype: torch.dtype
    ) -> WeightTiles:
        return weight_tiles(tensors["codes"], tensors["codebooks"], tensors["scales"], dtype=dtype)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], spec: AQLMSpec, bias: Tensor | None) -> Tensor:
        codes, codebooks, scales = (tensors[part] for part in ("codes", "codebooks", "scales"))
        if bias is not None and scales.requires_grad and not codebooks.requires_grad:
            # The gradient of the scales is read off the product, which a large bias would drown in half precision.
            return aqlm_linear(x, codes, codebooks, scales, None) + bias.to(x.dtype)
        return aqlm_linear(x, codes, codebooks, scales, bias)


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
        "the compiled kernels are missing: AQLM follows %d choices of codes instead of all pairs, and errs a few "
        "percent more. Reinstall with a C compiler, or set beam=256 and wait.",
        NARROW_BEAM,
    )


def _floats_of(start: QuantizedWeight, device: torch.device) -> Additive:
    codes, codebooks, scales = (start.tensors[part].to(device) for part in ("codes", "codebooks", "scales"))
    return Additive(
        codes=unsigned_codes(codes, codebooks.shape[1].bit_length() - 1),
        codebooks=codebooks.float().flatten(2),
        scales=scales.float().flatten(),
    )


def _stored(found: Additive, spec: AQLMSpec, shape: torch.Size, *, name: str) -> QuantizedWeight:
    """``found`` in the dtypes of ``spec``, or of the widened one where those cannot hold it."""
    layout = spec.tensor_layout(*shape)
    codes, size = found.codes, found.codebooks.shape[1]
    codebooks = found.codebooks.view(layout["codebooks"].shape).to(layout["codebooks"].dtype)
    scales = found.scales.view(layout["scales"].shape).to(layout["scales"].dtype)
    is_lost = (scales.float().flatten() - found.scales).norm() > MAX_SCALE_ERROR * found.scales.norm()
    if is_lost or not (torch.isfinite(codebooks).all() and torch.isfinite(scales).all()):
        if spec.scale_dtype == "float32":
            raise ValueError(
                f"{name}: the scales or codebooks hold numbers that float32 cannot. Rescale the weight, or skip the "
                f"layer with skip_modules=[{name!r}]."
            )
        logger.warning(
            "%s: %s cannot hold the scales and codebooks of this layer (very small or very large weights), so they "
            "are kept in float32.",
            name,
            spec.scale_dtype,
        )
        return _stored(found, spec.widened(), shape, name=name)
    return QuantizedWeight(
        spec=spec,
        out_features=shape[0],
        in_features=shape[1],
        tensors={"codes": wrapped_codes(codes, size, layout["codes"].dtype), "codebooks": codebooks, "scales": scales},
    )


def move_aqlm_codes(
    tensors: Mapping[str, Tensor], gradient: Tensor, *, step: float, max_change: float, trust_ratio: float
) -> tuple[Tensor, int]:
    """New codes for the groups of an AQLM weight that its gradient wants to move most.

    Args:
        tensors: ``codes``, ``codebooks`` and ``scales`` of the weight. Not changed.
        gradient: of the loss with respect to the weight, (out_features, in_features), float32.
        step, max_change, trust_ratio: as for :func:`.code_moves.moved_codes`.

    Returns:
        The codes as they are stored, and the number of groups that have new ones.
    """
    size = tensors["codebooks"].shape[1]
    codes = unsigned_codes(tensors["codes"], size.bit_length() - 1)
    moved = moved_codes(
        codes,
        tensors["codebooks"].float(),
        tensors["scales"].float().flatten(),
        gradient,
        step=step,
        max_change=max_change,
        trust_ratio=trust_ratio,
    )
    return wrapped_codes(moved, size, tensors["codes"].dtype), int((moved != codes).any(-1).sum())


register_method(AQLMMethod())
