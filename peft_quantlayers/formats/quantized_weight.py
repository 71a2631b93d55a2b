"""One quantized weight as a value: a spec, a shape and the tensors. No layer, no arithmetic."""

import dataclasses
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from torch import Tensor

from .quant_spec import QuantSpec

# Error that storing scales in a narrower dtype may make, relative to their norm; only one that underflows makes more.
MAX_SCALE_ERROR = 0.01


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight (out_features, in_features), or a stack of them (..., out_features, in_features), in quantized form.

    Invariant: ``tensors`` has exactly the names and dtypes of ``spec.tensor_layout(out_features, in_features)``, and
        its shapes with ``leading`` before them.

    Fields:
        spec: how it is stored; one for the whole stack.
        out_features, in_features: of each weight.
        tensors: by the names of the layout.
        leading: dimensions of the stack; () for a single weight.
    """

    spec: QuantSpec
    out_features: int
    in_features: int
    tensors: dict[str, Tensor]
    leading: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """(*leading, out_features, in_features)."""
        return (*self.leading, self.out_features, self.in_features)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and all other metadata included."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / math.prod(self.shape)

    def to(self, device: torch.device) -> Self:
        """The same weight on ``device``; tensors that are there already are shared."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def codes(self) -> Tensor:
        """The integer codes, unpacked: (*leading, out_features, in_features), or as the spec says where groups of
        weights share codes."""
        return self.spec.unpack_codes(self.tensors[self.spec.codes_name], self.in_features)

    def with_codes(self, codes: Tensor) -> Self:
        """This weight with other codes, shaped as :meth:`codes` gives them."""
        packed = self.spec.pack_codes(codes)
        return dataclasses.replace(self, tensors=self.tensors | {self.spec.codes_name: packed})

    @property
    def row_multiple(self) -> int:
        """Ranges of :meth:`rows` begin and end at multiples of this."""
        layout = self.spec.tensor_layout(self.out_features, self.in_features)
        return math.lcm(*(entry.rows_per_entry or 1 for entry in layout.values()))

    def rows(self, rows: slice) -> Self:
        """The output rows ``rows`` of each weight; its tensors are views where the layout allows it.

        Raises:
            ValueError: a step other than 1, no rows, or rows that cut through a group of output rows.
        """
        start, stop, step = rows.indices(self.out_features)
        if step != 1 or stop <= start:
            raise ValueError(f"{rows} names no range of the {self.out_features} rows.")
        spec, tensors = self.spec.sliced(
            self.tensors, slice(start, stop), out_features=self.out_features, in_features=self.in_features
        )
        return dataclasses.replace(self, spec=spec, out_features=stop - start, tensors=tensors)

    @property
    def has_rows_of_their_own(self) -> bool:
        """Whether each row of the weight, which is no stack, has a row of its own in each tensor."""
        layout = self.spec.tensor_layout(self.out_features, self.in_features).values()
        return not self.leading and all(entry.shape[0] == self.out_features for entry in layout)

    def take_rows(self, rows: Tensor) -> Self:
        """The rows of these indices (n,), copied, of a weight that :attr:`has_rows_of_their_own`."""
        tensors = {name: tensor.index_select(0, rows) for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, out_features=rows.numel(), tensors=tensors)

    def with_rows(self, rows: Tensor, new: "QuantizedWeight | None", *, n_rows: int) -> "QuantizedWeight":
        """This weight with ``n_rows`` rows, of which those of the indices ``rows`` are ``new``; tensors are copied.

        If ``new`` has wider metadata, the others' are widened too.

        Raises:
            ValueError: ``new`` is of another spec, apart from wider metadata.
        """
        if new is not None and new.spec not in (self.spec, self.spec.widened()):
            raise ValueError(f"rows stored as {new.spec} cannot lie in a weight that is stored as {self.spec}.")
        spec, kept = (self.spec if new is None else new.spec), min(n_rows, self.out_features)
        tensors = {}
        for name, entry in spec.tensor_layout(n_rows, self.in_features).items():
            tensors[name] = self.tensors[name].new_zeros(entry.shape, dtype=entry.dtype)
            tensors[name][:kept] = self.tensors[name][:kept]
            if new is not None:
                tensors[name][rows] = new.tensors[name]
        return dataclasses.replace(self, spec=spec, out_features=n_rows, tensors=tensors)

    def __getitem__(self, index: int) -> Self:
        """One entry of the first leading dimension; its tensors are views.

        Raises:
            IndexError: a single weight, or an index out of range.
        """
        if not self.leading or not -self.leading[0] <= index < self.leading[0]:
            raise IndexError(f"index {index} is out of range for a stack of the shape {self.leading}.")
        tensors = {name: tensor[index] for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, leading=self.leading[1:])

    @classmethod
    def stacked(cls, weights: Iterable["QuantizedWeight"], n_weights: int | None = None) -> "QuantizedWeight":
        """A stack of ``weights`` along a new first dimension; their tensors are copied, one weight at a time.

        Where some are of a widened spec (wider metadata), the stack is, and the others' metadata are widened too.

        Args:
            weights: of one shape, and of one spec but for that.
            n_weights: how many; not needed for a sequence.

        Raises:
            ValueError: no weights, or weights of different specs or shapes.
        """
        if isinstance(weights, Sequence):
            n_weights = len(weights)
        stack = first = None
        for index, weight in enumerate(weights):
            if first is None or stack is None:
                first = weight
                stack = dataclasses.replace(
                    weight,
                    leading=(cast(int, n_weights), *weight.leading),
                    tensors={k: t.new_empty(cast(int, n_weights), *t.shape) for k, t in weight.tensors.items()},
                )
            if weight.shape != first.shape:
                raise ValueError("only weights of one spec and one shape can be stacked.")
            stack = stack.with_entry(index, weight, in_place=True)
        if stack is None:
            raise ValueError("only weights of one spec and one shape can be stacked.")
        return stack

    @classmethod
    def joined(cls, weights: Sequence["QuantizedWeight"]) -> "QuantizedWeight":
        """``weights`` as one, the rows of each below those of the one before. Tensors that all rows of a weight share
        get the weight as first dimension; the others are concatenated.

        Raises:
            ValueError: as :meth:`stacked`, or their groups hold several rows that would lie apart.
        """
        stack, n_weights = cls.stacked(weights), len(weights)
        sides = (stack.out_features, stack.in_features)
        spec = stack.spec.joined(n_weights, *sides)
        if spec is None or len(stack.leading) > 1:
            raise ValueError(f"{n_weights} weights of {stack.spec} cannot lie in one, row below row.")
        layout = stack.spec.tensor_layout(*sides)
        tensors = {
            name: tensor if layout[name].rows_per_entry is None else tensor.flatten(0, 1)
            for name, tensor in stack.tensors.items()
        }
        return dataclasses.replace(
            stack, spec=spec, out_features=n_weights * stack.out_features, tensors=tensors, leading=()
        )

    def with_entry(self, index: int, weight: "QuantizedWeight", *, in_place: bool = False) -> "QuantizedWeight":
        """This stack with ``weight`` as the entry ``index`` of its first dimension; see :meth:`stacked`.

        ``in_place``: write into this stack's tensors where their dtypes stay; otherwise they are copied.

        Raises:
            ValueError: ``weight`` is of another spec, apart from wider metadata.
        """
        spec = self.spec
        if weight.spec != spec:
            if spec.widened() not in (weight.spec, weight.spec.widened()):
                raise ValueError(
                    f"only weights of one spec and one shape can be stacked, and here are {spec} and {weight.spec}. "
                    "An expert may need other metadata: quantize these experts with overrides (of HQQ, "
                    "double_quant=False)."
                )
            spec = spec.widened()
        tensors = {}
        for name, entry in spec.layout_of(self.shape).items():
            own = self.tensors[name].to(entry.dtype, copy=not in_place)
            own[index] = weight.tensors[name]
            tensors[name] = own
        return dataclasses.replace(self, spec=spec, tensors=tensors)

    @classmethod
    def empty(cls, spec: QuantSpec, shape: tuple[int, ...], device: torch.device | str) -> "QuantizedWeight":
        """A weight or stack of ``shape`` (..., out_features, in_features) whose tensors hold no values yet."""
        *leading, out_features, in_features = shape
        tensors = {
            name: torch.empty(entry.shape, dtype=entry.dtype, device=device)
            for name, entry in spec.layout_of(shape).items()
        }
        return cls(
            spec=spec, out_features=out_features, in_features=in_features, tensors=tensors, leading=tuple(leading)
        )

    def check(self, name: str) -> None:
        """Raise ValueError, naming the layer ``name``, unless the invariant holds and the values make sense."""
        layout = self.spec.layout_of(self.shape)
        if set(layout) != set(self.tensors):
            raise ValueError(f"{name}: expected the tensors {sorted(layout)}, got {sorted(self.tensors)}.")
        for tensor_name, expected in layout.items():
            tensor, shape = self.tensors[tensor_name], expected.shape
            if tuple(tensor.shape) != shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"{name}.{tensor_name}: expected {expected.dtype} of shape {shape}, got "
                    f"{tensor.dtype} of shape {tuple(tensor.shape)}. The file does not match its configuration."
                )
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise ValueError(f"{name}.{tensor_name} holds NaN or Inf: the checkpoint is damaged.")
        if damage := self.spec.find_damage(self.tensors, layout):
            raise ValueError(f"{name}{damage}: the checkpoint is damaged. Download or save it again.")


def is_lossy_in_half(weight: QuantizedWeight) -> bool:
    """Whether float16 cannot hold the wider scales and codebooks of ``weight``."""
    wider = [
        tensor
        for name, tensor in weight.tensors.items()
        if name != weight.spec.codes_name and tensor.dtype != torch.float16 and not tensor.is_meta
    ]
    return not all((tensor.half().float() - tensor).norm() <= MAX_SCALE_ERROR * tensor.norm() for tensor in wider)


def weight_checksum(weight: QuantizedWeight, *, start: int = 0) -> int:
    """CRC-32 of the bytes of all tensors, by name in sorted order, continued from ``start``."""
    for name in sorted(weight.tensors):
        start = zlib.crc32(stored_bytes(weight.tensors[name]), start)
    return start


def stored_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor of one dimension or more as they lie in memory row by row, for checksums."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data
