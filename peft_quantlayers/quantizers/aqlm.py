"""AQLM: its spec, and the method that makes and reads AQLM weights in the published layout."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantlayers_kernels.aqlm import aqlm_dequantize, aqlm_linear

from ..formats import QuantizedWeight, QuantSpec, TensorLayout
from ..formats.spec import METADATA_DTYPES, check_choice, check_integer, suggest_divisor
from ._aqlm_solver import fitted_codebooks, fitted_scales, improved_codes, initial_codes, reconstruct
from .method import QuantMethod, checked_layout, refuse_not_finite, register_method


@dataclass(frozen=True, kw_only=True)
class AQLMSpec(QuantSpec):
    """An AQLM weight: each group of weights is a row scale times a sum of one entry from each codebook.

    Fields:
        num_codebooks: entries that are summed.
        nbits_per_codebook: bits of a code, 1 to 16. Codes up to 8 bits are stored in a byte, others in two.
        in_group_size, out_group_size: shape of a group, inputs by outputs.
        scale_dtype: dtype of codebooks and scales.
        rounds: how often codes, codebooks and scales are fitted in turn after the initialisation.
        seed: of the random choices in the initialisation.
    """

    method = "aqlm"
    codes_name = "codes"

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    out_group_size: int = 1
    scale_dtype: str = "float16"
    rounds: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer("num_codebooks", self.num_codebooks, at_least=1, at_most=64)
        check_integer("nbits_per_codebook", self.nbits_per_codebook, at_least=1, at_most=16)
        check_integer("in_group_size", self.in_group_size, at_least=1, at_most=1024)
        check_integer("out_group_size", self.out_group_size, at_least=1, at_most=1024)
        check_choice("scale_dtype", self.scale_dtype, METADATA_DTYPES)
        check_integer("rounds", self.rounds, at_least=0, at_most=1000)
        check_integer("seed", self.seed, at_least=0, at_most=2**63 - 1)

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        for side, size, group, field in (
            ("in_features", in_features, self.in_group_size, "in_group_size"),
            ("out_features", out_features, self.out_group_size, "out_group_size"),
        ):
            if size % group:
                raise ValueError(
                    f"{side}={size} is not a multiple of {field}={group}. Use one that divides it (for example "
                    f"{suggest_divisor(size, group)})."
                )
        n_out, n_in = out_features // self.out_group_size, in_features // self.in_group_size
        codes_dtype = torch.int8 if self.nbits_per_codebook <= 8 else torch.int16
        dtype = getattr(torch, self.scale_dtype)
        entries = (self.num_codebooks, 2**self.nbits_per_codebook, self.out_group_size, self.in_group_size)
        return {
            "codes": TensorLayout(shape=(n_out, n_in, self.num_codebooks), dtype=codes_dtype),
            "codebooks": TensorLayout(shape=entries, dtype=dtype),
            "scales": TensorLayout(shape=(n_out, 1, 1, 1), dtype=dtype),
        }


class AQLMMethod(QuantMethod[AQLMSpec]):
    """Additive Quantization of Language Models, by plain error. Source: Egiazarian et al. 2024.

    Residual k-means, then codes (iterated conditional modes), codebooks (one linear system) and row scales (closed
    form) in turn. Deterministic under ``spec.seed``.
    """

    spec_type = AQLMSpec

    def quantize(self, weight: Tensor, spec: AQLMSpec, *, name: str) -> QuantizedWeight:
        out_features, in_features = weight.shape
        layout = checked_layout(weight, spec, name=name)
        weight = weight.detach().float().contiguous()
        refuse_not_finite(weight, name=name)
        n_out, n_in, num_codebooks = layout["codes"].shape
        size = 2**spec.nbits_per_codebook
        grouped = weight.view(n_out, spec.out_group_size, n_in, spec.in_group_size).permute(0, 2, 1, 3)
        rows = grouped.reshape(n_out, -1)
        scales = rows.square().mean(1).sqrt()
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))

        def scaled_vectors(scales: Tensor) -> tuple[Tensor, Tensor]:
            """Vectors in codebook units, and how much an error in each counts in weight units."""
            vectors = (rows / scales[:, None]).view(n_out * n_in, -1)
            return vectors, scales.square().repeat_interleave(n_in)

        generator = torch.Generator().manual_seed(spec.seed)
        vectors, importance = scaled_vectors(scales)
        codes, codebooks = initial_codes(
            vectors, num_codebooks=num_codebooks, size=size, weights=importance, generator=generator
        )
        for _ in range(spec.rounds):
            codebooks = fitted_codebooks(vectors, codes, codebooks, importance)
            codes = improved_codes(vectors, codes, codebooks, passes=2)
            scales = fitted_scales(rows, reconstruct(codes, codebooks).view(n_out, -1), scales)
            vectors, importance = scaled_vectors(scales)
        codebooks = fitted_codebooks(vectors, codes, codebooks, importance)

        stored_codebooks = codebooks.view(layout["codebooks"].shape).to(layout["codebooks"].dtype)
        stored_scales = scales.view(layout["scales"].shape).to(layout["scales"].dtype)
        if not (torch.isfinite(stored_codebooks).all() and torch.isfinite(stored_scales).all()):
            raise ValueError(f"{name}: {spec.scale_dtype} cannot hold the scales. Use scale_dtype='float32'.")
        wrapped = torch.where(codes >= size // 2, codes - size, codes) if size > 2 else codes
        stored_codes = wrapped.view(layout["codes"].shape).to(layout["codes"].dtype)
        return QuantizedWeight(
            spec=spec,
            out_features=out_features,
            in_features=in_features,
            tensors={"codes": stored_codes, "codebooks": stored_codebooks, "scales": stored_scales},
        )

    def dequantize(
        self, tensors: Mapping[str, Tensor], spec: AQLMSpec, *, in_features: int, dtype: torch.dtype
    ) -> Tensor:
        return aqlm_dequantize(tensors["codes"], tensors["codebooks"], tensors["scales"], dtype)

    def linear(self, x: Tensor, tensors: Mapping[str, Tensor], spec: AQLMSpec, bias: Tensor | None) -> Tensor:
        return aqlm_linear(x, tensors["codes"], tensors["codebooks"], tensors["scales"], bias)


register_method(AQLMMethod())
