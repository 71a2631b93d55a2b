"""AQLM: the method that makes and reads AQLM weights in the published layout."""

import dataclasses
import logging
from functools import cache, partial
from typing import cast

import torch
from torch import Tensor

from quantlayers_kernels import aqlm, native
from quantlayers_kernels.aqlm import aqlm_dequantize
from quantlayers_kernels.aqlm.choice import matrix_to_groups
from quantlayers_kernels.aqlm.cpu import prepared
from quantlayers_kernels.aqlm.tiles import weight_tiles
from quantlayers_kernels.aqlm.update import updated_codes
from quantlayers_kernels.prepared import PreparedProduct
from quantlayers_kernels.tiled import WeightTiles

from ...formats import QuantizedWeight
from ...formats.quantized_weight import MAX_SCALE_ERROR
from ..base import DeltaRows, QuantMethod, checked_hessian, checked_layout, refuse_not_finite
from ..registry import register_method
from .code_moves import moved_codes, scaled_gradient
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
        if spec.row_parts > 1:
            plain = dataclasses.replace(spec, row_parts=1)
            return QuantizedWeight.joined(
                [
                    self.quantize(
                        weight[rows],
                        plain,
                        hessian=hessian,
                        start=None if start is None else start.rows(rows),
                        iterations=iterations,
                    )
                    for rows in _ranges(spec, len(weight))
                ]
            )
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
        codes = []
        for first, part in _row_parts(weight):
            part_delta = partial(_delta_from, delta, first)
            codes.append(updated_codes(*_tensors(part), part_delta))
        return dataclasses.replace(weight, tensors=weight.tensors | {"codes": _cat(codes)})

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return _cat([aqlm_dequantize(*_tensors(part), dtype) for _, part in _row_parts(weight)])

    def weight_tiles(self, weight: QuantizedWeight, *, dtype: torch.dtype) -> WeightTiles:
        for first, part in _row_parts(weight):
            for rows, tile in weight_tiles(*_tensors(part), dtype=dtype):
                yield _shifted(rows, first), tile

    def linear(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return _cat(
            [
                _linear(x, part, None if bias is None else bias[first : first + part.out_features])
                for first, part in _row_parts(weight)
            ],
            dim=-1,
        )

    def prepared_product(self, weight: QuantizedWeight) -> PreparedProduct | None:
        return prepared(*_tensors(weight)) if cast(AQLMSpec, weight.spec).row_parts == 1 else None


def _linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    codes, codebooks, scales = _tensors(weight)
    if bias is not None and scales.requires_grad and not codebooks.requires_grad:
        # The gradient of the scales is computed from the product; in half precision a large bias in it would lose
        # their digits.
        return aqlm.linear(x, codes, codebooks, scales, None) + bias.to(x.dtype)
    return aqlm.linear(x, codes, codebooks, scales, bias)


def _row_parts(weight: QuantizedWeight) -> list[tuple[int, QuantizedWeight]]:
    """First row and weight of each part of the rows that has codebooks of its own."""
    spec = cast(AQLMSpec, weight.spec)
    if spec.row_parts == 1:
        return [(0, weight)]
    return [(rows.start, weight.rows(rows)) for rows in _ranges(spec, weight.out_features)]


def _ranges(spec: AQLMSpec, out_features: int) -> list[slice]:
    height = out_features // spec.row_parts
    return [slice(start, start + height) for start in range(0, out_features, height)]


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _delta_from(delta: DeltaRows, first: int, rows: slice) -> Tensor:
    return delta(_shifted(rows, first))


def _tensors(weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
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
    _, codebooks, scales = _tensors(start)
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
    weight: QuantizedWeight,
    gradient: Tensor,
    *,
    step: float,
    max_change: float,
    trust_ratio: float,
    is_scaled: bool = False,
) -> tuple[QuantizedWeight, int]:
    """New codes for the groups of an AQLM weight whose gradient is largest.

    Args:
        weight: not changed.
        gradient: of the loss with respect to the weight, (out_features, in_features), float32.
        step, max_change, trust_ratio: as for :func:`.code_moves.moved_codes`.
        is_scaled: whether each weight's gradient is scaled first, by :func:`.code_moves.scaled_gradient`.

    Returns:
        The weight with its new codes, and the number of groups that have new ones.
    """
    moved, n_changed = [], 0
    gradient = scaled_gradient(gradient) if is_scaled else gradient
    for first, part in _row_parts(weight):
        codes, (_, codebooks, scales) = part.codes(), _tensors(part)
        new = moved_codes(
            codes,
            codebooks.float(),
            scales.float().flatten(),
            gradient[first : first + part.out_features],
            step=step,
            max_change=max_change,
            trust_ratio=trust_ratio,
        )
        moved.append(new)
        n_changed += int((new != codes).any(-1).sum())
    return weight.with_codes(_cat(moved)), n_changed


register_method(AQLMMethod())
