"""One quantized layer of a model that is exported, and the matrices that files of a float model hold of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats import QuantizedWeight, QuantSpec
from ..integrations.expert_tensors import ExpertTensor


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One weight matrix as engines know it: a linear layer, or a projection of one expert.

    Fields:
        name: of the module.
        expert: of the stack; None for a linear layer.
        rows: of the layer's weight, or of the expert's.
    """

    name: str
    expert: int | None
    rows: slice


@dataclass(frozen=True, kw_only=True)
class StackFacts:
    """What a stack of experts is, beside its shape.

    Fields:
        n_experts: weights in it.
        parameter: its name in the experts module, such as ``gate_up_proj``.
        has_gate: its rows are those of gate and up, two matrices that engines keep apart.
        is_interleaved: gate and up alternate; otherwise one follows the other.
        tensors: of a float model's files, in which its weights lie; () where that is not known.
        has_branch: low-rank branches are added to its results.
    """

    n_experts: int
    parameter: str
    has_gate: bool
    is_interleaved: bool
    tensors: tuple[ExpertTensor, ...]
    has_branch: bool

    @property
    def are_single(self) -> bool:
        """Whether the files keep the matrices of each expert by themselves."""
        return bool(self.tensors) and all(tensor.expert is not None for tensor in self.tensors)


@dataclass(frozen=True, kw_only=True)
class SourceLayer:
    """One quantized layer: a linear one, or a stack of experts.

    Fields:
        name: of its module, as the files spell it.
        module: the same, as the model spells it.
        spec: how it is stored.
        out_features, in_features: of its weight, or of each expert's.
        is_transposed: its architecture's module keeps the weight as (in_features, out_features).
        model_type: of the model's config.
        stack: of a stack of experts; None for a linear layer.
        tensor: reads one tensor of its layout.
        weight: reads all of them.
        branch: reads A and B of its low-rank branch; None where it has none.
    """

    name: str
    module: str
    spec: QuantSpec
    out_features: int
    in_features: int
    is_transposed: bool
    model_type: str = ""
    stack: StackFacts | None = None
    tensor: Callable[[str], Tensor]
    weight: Callable[[], QuantizedWeight]
    branch: Callable[[], tuple[Tensor, Tensor]] | None

    @property
    def n_rows(self) -> int:
        """Of the whole layer, all experts together."""
        return self.out_features * (self.stack.n_experts if self.stack else 1)

    @property
    def n_weights(self) -> int:
        """Of the whole layer."""
        return self.n_rows * self.in_features

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """Its matrices as a float model's files hold them, expert by expert."""
        if self.stack is None:
            return (Matrix(name=self.name, expert=None, rows=slice(0, self.out_features)),)
        return tuple(
            Matrix(name=tensor.key.removesuffix(".weight"), expert=expert, rows=tensor.rows)
            for tensor in self.stack.tensors
            for expert in (range(self.stack.n_experts) if tensor.expert is None else (tensor.expert,))
        )

    def float_tensors(self, dense_of: Callable[[Matrix], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a float model's files, by name, of the matrices (rows, in_features) that ``dense_of`` gives.

        One matrix at a time, but for files that keep all experts in one tensor.
        """
        if self.stack is None:
            weight = dense_of(self.matrices[0])
            yield f"{self.name}.weight", weight.t() if self.is_transposed else weight
            return
        matrices = iter(self.matrices)
        for tensor in self.stack.tensors:
            if tensor.expert is not None:
                weight = dense_of(next(matrices))
            else:
                weight = torch.stack([dense_of(next(matrices)) for _ in range(self.stack.n_experts)])
            yield tensor.key, weight.transpose(-1, -2) if tensor.is_transposed else weight


def weight_of(weight: QuantizedWeight, matrix: Matrix) -> QuantizedWeight:
    """The weight of the linear layer or expert that ``matrix`` is a part of, all rows of it."""
    return weight if matrix.expert is None else weight[matrix.expert]


def part_of(weight: QuantizedWeight, matrix: Matrix) -> QuantizedWeight:
    """The rows of ``matrix`` alone; raises as :meth:`QuantizedWeight.rows`."""
    whole = weight_of(weight, matrix)
    return whole if matrix.rows == slice(0, whole.out_features) else whole.rows(matrix.rows)
