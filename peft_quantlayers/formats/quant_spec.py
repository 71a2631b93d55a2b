"""What a quantized tensor means, as plain values that go into JSON and come back unchanged.

Here: the base class of all specs. Each spec is defined in the folder of its method. May import torch and the checks of
arguments only.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

from ..arguments import check_choice, nearest

METADATA_DTYPES = ("float16", "bfloat16", "float32")
# A quantized weight that takes as many is left dense.
HALF_PRECISION_BITS = 16

Role = Literal["codes", "scales", "zeros", "codebooks"]
# Roles of the tensors other than the codes, the same for every method.
METADATA_ROLES: tuple[Role, ...] = ("scales", "zeros", "codebooks")


SpecT = TypeVar("SpecT", bound="QuantSpec")


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """Shape, dtype and role that a stored tensor must have.

    Fields:
        shape: of one weight; a stack of weights has its leading dimensions before it.
        dtype: integer or floating.
        role: what the tensor is for.
        rows_per_entry: how many output rows one entry of the first dimension belongs to; None for a tensor that all
            rows share.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: Role
    rows_per_entry: int | None = 1


@dataclass(frozen=True, kw_only=True)
class QuantSpec(ABC):
    """How one weight is stored, and how a write to it is quantized again: numbers and names, no tensors.

    Subclasses are frozen dataclasses that check their fields in ``__post_init__``, so that every spec is valid.
    ``method`` names the registered quantization method.
    """

    method: ClassVar[str]
    codes_name: ClassVar[str] = "codes"
    """Name of the tensor that holds the codes."""
    shown_fields: ClassVar[tuple[str, ...]] = ()
    """Fields that a layer's ``repr`` shows."""

    def __post_init__(self) -> None:  # noqa: B027  a spec may have nothing to check
        """Subclasses check their fields here."""

    @abstractmethod
    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        """Name, shape, dtype and role of every tensor of a weight of this shape.

        Raises:
            ValueError: a weight of this shape cannot be stored this way; says why and what would fit.
        """

    def layout_of(self, shape: tuple[int, ...]) -> dict[str, TensorLayout]:
        """:meth:`tensor_layout` of a stack of weights (..., out_features, in_features), its first dimensions before
        those of each tensor."""
        *leading, out_features, in_features = shape
        layout = self.tensor_layout(out_features, in_features)
        return {
            name: dataclasses.replace(entry, shape=(*leading, *entry.shape)) if leading else entry
            for name, entry in layout.items()
        }

    def bits_per_weight(self, out_features: int, in_features: int) -> tuple[float, float]:
        """Stored bits per weight of the codes, and of all tensors together. Raises as :meth:`tensor_layout`."""
        bits = {
            name: 8 * math.prod(entry.shape) * entry.dtype.itemsize / (out_features * in_features)
            for name, entry in self.tensor_layout(out_features, in_features).items()
        }
        return bits[self.codes_name], sum(bits.values())

    # ---- codes

    @property
    def max_code(self) -> int | None:
        """The largest code, where each weight has a code of its own and codes are ordered: along the codes from 0 to
        it the value of a weight never changes direction. None where a code names an entry of a codebook."""
        return None

    def unpack_codes(self, codes: Tensor, in_features: int) -> Tensor:
        """The codes as integers, one by one: (..., out_features, in_features) where each weight has its own.

        Args:
            codes: the tensor ``codes_name`` as it is stored, with leading dimensions or without.
            in_features: of the weight.
        """
        return codes

    def pack_codes(self, codes: Tensor) -> Tensor:
        """The inverse of :meth:`unpack_codes`."""
        return codes

    def sliced(
        self, tensors: Mapping[str, Tensor], rows: slice, *, out_features: int, in_features: int
    ) -> tuple[Self, dict[str, Tensor]]:
        """Spec and tensors (views) of the output rows ``rows``, which has a start, a stop and no step.

        Raises:
            ValueError: the rows do not begin and end where entries of the tensors do.
        """
        found = {}
        for name, entry in self.tensor_layout(out_features, in_features).items():
            size = entry.rows_per_entry
            if size is None:
                found[name] = tensors[name]
                continue
            if rows.start % size or rows.stop % size:
                raise ValueError(
                    f"rows {rows.start} to {rows.stop} cut through an entry of {name}, which holds {size} rows."
                )
            dim = tensors[name].dim() - len(entry.shape)
            found[name] = tensors[name].narrow(dim, rows.start // size, (rows.stop - rows.start) // size)
        return self, found

    def joined(self, n_weights: int, out_features: int, in_features: int) -> Self | None:
        """The spec of ``n_weights`` weights of this spec and shape as one, each one's rows below those of the one
        before; None where nothing says which rows belong together. See :meth:`QuantizedWeight.joined`."""
        layout = self.tensor_layout(out_features, in_features)
        return self if all(entry.rows_per_entry is not None for entry in layout.values()) else None

    # ---- metadata

    def find_damage(self, tensors: Mapping[str, Tensor], layout: Mapping[str, TensorLayout]) -> str:
        """A description of values that no quantizer writes, to follow a layer's name; empty if there are none.

        A row or group of zeros may have a scale of zero; if all scales of a layer are zero, they were lost.
        """
        scales = [name for name, entry in layout.items() if entry.role == "scales"]
        is_lost = bool(scales) and not any(tensors[name].any() for name in scales)
        return f".{scales[0]} holds nothing but zeros" if is_lost else ""

    def smaller_metadata(self, out_features: int, in_features: int) -> str:
        """Fields of a spec whose codes take about as many bytes for a weight of this shape, and its metadata no more.

        Empty where there is no such spec. Raises as :meth:`tensor_layout`.
        """
        return ""

    def misfit(self, out_features: int, in_features: int) -> str:
        """Why a weight of this shape cannot be stored this way, in a few words; empty if it can."""
        try:
            self.tensor_layout(out_features, in_features)
        except ValueError as error:
            return str(error).partition(". ")[0].removesuffix(".")
        return ""

    def fitted(self, out_features: int, in_features: int) -> Self | None:
        """This spec, or the nearest one with smaller groups that can hold a weight of this shape.

        None where there is none that is worth it; a method whose groups cannot shrink has only itself to offer.
        """
        return None if self.misfit(out_features, in_features) else self

    def trainable_roles(self, out_features: int, in_features: int) -> dict[str, Role]:
        """Name and role of the tensors that may be trained while the codes stay: the floating ones, by default.

        ``dequantize`` of the method must be differentiable in these tensors.
        """
        layout = self.tensor_layout(out_features, in_features)
        return {name: entry.role for name, entry in layout.items() if entry.dtype.is_floating_point}

    def extended(self) -> Self:
        """A spec of the same format that holds a weight of this spec, and a delta in addition.

        Raises:
            NotImplementedError: the format cannot be extended.
        """
        raise NotImplementedError(f"{self.method} weights cannot be extended in their own format.")

    def widened(self) -> Self:
        """This spec with floating tensors in float32, so that trained ones are stored unrounded.

        A spec without a field ``scale_dtype`` is returned as it is: it has one dtype for its tensors. So is one that
        must not leave its dtype.
        """
        if any(field.name == "scale_dtype" for field in dataclasses.fields(self)):
            return dataclasses.replace(self, scale_dtype="float32")  # type: ignore[call-arg]
        return self

    def stored_forms(self) -> tuple[Self, ...]:
        """The specs that a weight may have that was quantized to this one: itself, or those that hold more numbers."""
        return tuple(dict.fromkeys((self, self.widened())))

    @property
    def format_version(self) -> int:
        """The oldest version of our checkpoint format whose readers know all that this spec says."""
        return 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-able fields, with the method's name."""
        return {"method": self.method, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The spec that :meth:`to_dict` wrote.

        Raises:
            ValueError: an unknown field, another method's name, or a value that the spec refuses.
            TypeError: a value of the wrong type.
        """
        fields = dict(fields)
        method = fields.pop("method", cls.method)
        if method != cls.method:
            raise ValueError(f"expected a spec of method {cls.method!r}, got {method!r}.")
        known = sorted(field.name for field in dataclasses.fields(cls))
        unknown = sorted(set(fields) - {*known}, key=str)
        if unknown:
            near = nearest(unknown[0], known)
            raise ValueError(f"unknown field(s) {unknown} in a {cls.method!r} spec{near}; known are {known}.")
        return cls(**fields)


def dtype_name(field: str, value: Any) -> str:
    """The name of a dtype, given as that or as ``torch.dtype``; ValueError unless it is of :data:`METADATA_DTYPES`."""
    name = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else value
    check_choice(field, name, METADATA_DTYPES)
    return str(name)


def with_smaller_groups(spec: SpecT, field: str, side: int, out_features: int, in_features: int) -> SpecT | None:
    """``spec`` with the largest group size in ``field``, up to its own, that divides ``side``.

    None if the weight (out_features, in_features) would then take as many bits as in half precision.
    """
    size = next(size for size in range(min(side, getattr(spec, field)), 0, -1) if side % size == 0)
    fitted = dataclasses.replace(spec, **{field: size})
    return fitted if fitted.bits_per_weight(out_features, in_features)[1] < HALF_PRECISION_BITS else None


def suggest_divisor(size: int, near: int) -> int:
    """The divisor of ``size`` closest to ``near``, the smaller one of two at the same distance."""
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: (abs(d - near), d))
