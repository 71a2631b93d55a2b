"""How an AQLM weight is stored, and the config that users pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from quantlayers_kernels.aqlm.reference import unsigned_codes, wrapped_codes

from ...arguments import check_integer
from ...formats import QuantSpec, TensorLayout
from ...formats.quant_spec import dtype_name, suggest_divisor
from ..quant_config import QuantConfig


@dataclass(frozen=True, kw_only=True)
class AQLMSpec(QuantSpec):
    """An AQLM weight: each group of weights is a row scale times a sum of one entry from each codebook.

    Fields:
        num_codebooks: entries that are summed.
        nbits_per_codebook: bits of a code, 1 to 16. Codes up to 8 bits are stored in a byte, others in two.
        in_group_size, out_group_size: shape of a group, inputs by outputs.
        scale_dtype: dtype of codebooks and scales. A layer whose scales it cannot hold gets float32.
        rounds: iterations after the initialisation; each fits codebooks, codes and scales in turn.
        beam: width of the beam search for the codes of a group; 1 is the fastest, and with two codebooks a beam as
            wide as a codebook tries all pairs. None for all pairs of two codebooks of up to 8 bits, and 8 otherwise
            (also on a CPU without the compiled kernels, where all pairs would take hours).
        seed: for the random initialisation.
        row_parts: parts of the rows, equally high and one above the other, that have codebooks of their own: of
            published mixtures gate and up, which transformers 5 keeps in one weight.
    """

    method = "aqlm"
    shown_fields = ("num_codebooks", "nbits_per_codebook", "in_group_size", "out_group_size")

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8
    out_group_size: int = 1
    scale_dtype: str = "float16"
    rounds: int = 6
    beam: int | None = None
    seed: int = 0
    row_parts: int = 1

    def __post_init__(self) -> None:
        check_integer("num_codebooks", self.num_codebooks, at_least=1, at_most=64)
        check_integer("nbits_per_codebook", self.nbits_per_codebook, at_least=1, at_most=16)
        check_integer("in_group_size", self.in_group_size, at_least=1, at_most=1024)
        check_integer("out_group_size", self.out_group_size, at_least=1, at_most=1024)
        object.__setattr__(self, "scale_dtype", dtype_name("scale_dtype", self.scale_dtype))
        check_integer("rounds", self.rounds, at_least=0, at_most=1000)
        if self.beam is not None:
            check_integer("beam", self.beam, at_least=1, at_most=512)
        check_integer("seed", self.seed, at_least=0, at_most=2**63 - 1)
        check_integer("row_parts", self.row_parts, at_least=1, at_most=64)

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
        if n_rows_left := out_features % (self.row_parts * self.out_group_size):
            raise ValueError(
                f"out_features={out_features} is not a multiple of row_parts={self.row_parts} times "
                f"out_group_size={self.out_group_size}: {n_rows_left} rows are left. Use row_parts=1."
            )
        n_out, n_in = out_features // self.out_group_size, in_features // self.in_group_size
        codes_dtype = torch.int8 if self.nbits_per_codebook <= 8 else torch.int16
        dtype = getattr(torch, self.scale_dtype)
        entries = (self.num_codebooks, 2**self.nbits_per_codebook, self.out_group_size, self.in_group_size)
        rows = self.out_group_size
        codebooks = TensorLayout(shape=entries, dtype=dtype, role="codebooks", rows_per_entry=None)
        if self.row_parts > 1:
            codebooks = dataclasses.replace(
                codebooks, shape=(self.row_parts, *entries), rows_per_entry=out_features // self.row_parts
            )
        return {
            "codes": TensorLayout(
                shape=(n_out, n_in, self.num_codebooks), dtype=codes_dtype, role="codes", rows_per_entry=rows
            ),
            "codebooks": codebooks,
            "scales": TensorLayout(shape=(n_out, 1, 1, 1), dtype=dtype, role="scales", rows_per_entry=rows),
        }

    def sliced(
        self, tensors: Mapping[str, Tensor], rows: slice, *, out_features: int, in_features: int
    ) -> tuple[Self, dict[str, Tensor]]:
        """As :meth:`QuantSpec.sliced`: rows of one part have its codebooks, and rows of several are whole parts."""
        sides = {"out_features": out_features, "in_features": in_features}
        if self.row_parts == 1:
            return super().sliced(tensors, rows, **sides)
        height = out_features // self.row_parts
        first, last = rows.start // height, (rows.stop - 1) // height
        if first < last:
            spec, found = super().sliced(tensors, rows, **sides)
            return dataclasses.replace(spec, row_parts=last - first + 1), found
        codebooks = tensors["codebooks"].select(-5, first)
        plain = dataclasses.replace(self, row_parts=1)
        return plain.sliced(dict(tensors) | {"codebooks": codebooks}, rows, **sides)

    def joined(self, n_weights: int, out_features: int, in_features: int) -> Self | None:
        return dataclasses.replace(self, row_parts=n_weights) if self.row_parts == 1 else None

    def to_dict(self) -> dict[str, Any]:
        """As :meth:`QuantSpec.to_dict`, without the field that older versions do not know where it says nothing."""
        fields = super().to_dict()
        return fields if self.row_parts > 1 else {name: fields[name] for name in fields if name != "row_parts"}

    @property
    def format_version(self) -> int:
        return 1 if self.row_parts == 1 else 7

    def unpack_codes(self, codes: Tensor, in_features: int) -> Tensor:
        """Indices into the codebooks, (..., out_groups, in_groups, num_codebooks), int64."""
        return unsigned_codes(codes, self.nbits_per_codebook)

    def pack_codes(self, codes: Tensor) -> Tensor:
        dtype = torch.int8 if self.nbits_per_codebook <= 8 else torch.int16
        return wrapped_codes(codes, 2**self.nbits_per_codebook, dtype)

    def find_damage(self, tensors: Mapping[str, Tensor], layout: Mapping[str, TensorLayout]) -> str:
        size = 2**self.nbits_per_codebook
        low, high = (int(bound) for bound in torch.aminmax(tensors["codes"]))
        if low < -(size // 2) or high >= size:
            return f".codes holds codes from {low} to {high}, which codebooks of {size} entries do not have"
        return super().find_damage(tensors, layout)

    def smaller_metadata(self, out_features: int, in_features: int) -> str:
        """The largest codebooks of up to 8 bits that fit, one for each byte that a group's codes take now."""
        n_bytes = self.num_codebooks * (1 if self.nbits_per_codebook <= 8 else 2)
        for nbits in range(min(8, self.nbits_per_codebook), 0, -1):
            spec = dataclasses.replace(self, num_codebooks=n_bytes, nbits_per_codebook=nbits)
            codes, total = spec.bits_per_weight(out_features, in_features)
            if total <= 2 * codes:
                return f"num_codebooks={n_bytes}, nbits_per_codebook={nbits}"
        return ""

    def extended(self) -> "AQLMSpec":
        return dataclasses.replace(self, num_codebooks=self.num_codebooks + 1)


@dataclass(frozen=True, kw_only=True)
class AQLMConfig(QuantConfig, AQLMSpec):
    """Quantize a model with AQLM. Fields: those of :class:`AQLMSpec` and of :class:`QuantConfig`.

    Raises:
        ValueError: a value that is not supported.
        TypeError: a value of the wrong type.
    """

    spec_type = AQLMSpec
