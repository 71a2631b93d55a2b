"""What all export formats share: what a format is asked about a layer, and what it does with a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...formats import QuantizedWeight, QuantSpec
from ...methods import get_method
from ..export_report import LayerExport
from ..export_source import ModelSource
from ..source_layer import Matrix, SourceLayer, StackFacts, weight_of
from ..uniform_grid import are_zeros_codes
from .vllm_command import MAX_RANK

Approximation = Literal["8bit", "adapter", "requantize"]
AdapterForm = Literal["peft", "mlx", "gguf"]
APPROXIMATIONS: tuple[Approximation, ...] = ("8bit", "adapter", "requantize")
ANY_RANK = 1 << 16
# Two factors of a low-rank delta, (r, in_features) and (out_features, r), scaling included.
LowRank = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class LayerFacts:
    """What decides whether a format can hold a layer.

    Fields:
        name: of the layer.
        spec: how it is stored.
        out_features, in_features: of its weight.
        nbits, group_size: of a uniform grid with groups along the inputs; 0 for any other weight.
        has_code_zeros: its zeros are codes: integers in their range.
        is_symmetric: its zeros all lie in the middle of the codes.
        is_transposed: its architecture keeps the weight as (in_features, out_features), as GPT-2 does.
        model_type: of the model's config.
        stack: of a stack of experts; None for a linear layer.
    """

    name: str
    spec: QuantSpec
    out_features: int
    in_features: int
    nbits: int = 0
    group_size: int = 0
    has_code_zeros: bool = False
    is_symmetric: bool = False
    is_transposed: bool = False
    model_type: str = ""
    stack: StackFacts | None = None

    @property
    def method(self) -> str:
        """The quantization method."""
        return self.spec.method

    @property
    def is_uniform(self) -> bool:
        """Whether the weight is integers times scales, with groups along the inputs."""
        return self.nbits > 0


def facts_of(layer: SourceLayer) -> LayerFacts:
    """Reads the scales and zeros of ``layer``, not its codes."""
    shape: dict[str, Any] = {"out_features": layer.out_features, "in_features": layer.in_features}
    spec: Any = layer.spec
    common: dict[str, Any] = {
        "name": layer.name,
        "spec": spec,
        "is_transposed": layer.is_transposed and layer.stack is None,
        "model_type": layer.model_type,
        "stack": layer.stack,
    }
    if spec.method != "hqq" or spec.axis != 1:
        return LayerFacts(**common, **shape)
    has_zeros = "zero" in spec.tensor_layout(**shape)
    middle = float(1 << (spec.nbits - 1))
    zero = layer.tensor("zero").float() if has_zeros else torch.tensor([middle])
    return LayerFacts(
        **common,
        **shape,
        nbits=spec.nbits,
        group_size=spec.group_size or layer.in_features,
        has_code_zeros=are_zeros_codes(zero, spec.nbits),
        is_symmetric=bool((zero == middle).all()),
    )


@dataclass(frozen=True, kw_only=True)
class ExportTask:
    """One export, checked and ready to be written.

    Fields:
        source: the model.
        folder: where to write, empty and not yet at its place.
        facts: of each layer of the source.
        dtype: of dense tensors, scales and zeros.
        approximate: how to store what the format does not hold; None for what it holds.
        requantized: gives the weight that is written in the place of a layer's own, by its name in the model; None
            without one.
        computed: if given, takes the weight that readers compute for each layer, by its name in the model.
    """

    source: ModelSource
    folder: Path
    facts: Mapping[str, LayerFacts]
    dtype: torch.dtype
    approximate: Approximation | None
    requantized: Callable[[str], QuantizedWeight] | None = None
    computed: dict[str, Tensor] | None = None

    def weight(self, layer: SourceLayer) -> QuantizedWeight:
        """The weight of ``layer`` that is to be written."""
        return layer.weight() if self.requantized is None else self.requantized(layer.module)


@dataclass(kw_only=True)
class Written:
    """What a format has written.

    Fields:
        layers: the quantized layers.
        config: config.json; None for a format without one.
        low_rank: deltas that the format leaves to an adapter, by layer.
        notes: for the report.
        row_order: where an engine stores rows of layers in another order: of each of its tensors, the layer, and the
            row of it in each place.
    """

    layers: list[LayerExport]
    config: dict[str, Any] | None = None
    low_rank: dict[str, LowRank] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    row_order: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


class Comparison:
    """What readers compute of a layer beside what it was, one matrix after the other."""

    def __init__(self, task: ExportTask, layer: SourceLayer) -> None:
        self._layer, self._own = layer, layer.weight()
        self._sums = {"error": 0.0, "weight": 0.0}
        self._computed: Tensor | None = None
        if task.computed is not None:
            shape = (layer.n_rows // layer.out_features, layer.out_features, layer.in_features)
            self._computed = torch.empty(shape)
            task.computed[layer.module] = self._computed if layer.stack else self._computed[0]

    def add(self, matrix: Matrix, computed: Tensor) -> None:
        """``matrix``, of which readers compute ``computed``, (rows, in_features), float32."""
        own = weight_of(self._own, matrix)
        weight = get_method(own.spec.method).dequantize(own, dtype=torch.float32)[matrix.rows]
        for name, values in (("error", computed - weight), ("weight", weight)):
            self._sums[name] += values.norm(dtype=torch.float64).item() ** 2
        if self._computed is not None:
            self._computed[matrix.expert or 0, matrix.rows] = computed

    def result(self, *, stored_as: str, bits_after: float) -> LayerExport:
        """The report of the layer."""
        return LayerExport(
            name=self._layer.name,
            n_weights=self._layer.n_weights,
            stored_as=stored_as,
            bits_before=self._own.bits_per_weight,
            bits_after=bits_after,
            error_norm=self._sums["error"] ** 0.5,
            weight_norm=self._sums["weight"] ** 0.5,
        )


def compared(
    task: ExportTask, layer: SourceLayer, computed: Tensor, *, stored_as: str, bits_after: float
) -> LayerExport:
    """The report of a linear layer of which readers compute ``computed``, (out_features, in_features), float32."""
    comparison = Comparison(task, layer)
    comparison.add(layer.matrices[0], computed)
    return comparison.result(stored_as=stored_as, bits_after=bits_after)


def why_not_single(stack: StackFacts) -> str:
    """Why the matrices of ``stack`` are not those of single experts in the files; empty if they are."""
    if stack.are_single:
        return ""
    key = stack.tensors[0].key
    return f"files of this architecture keep all experts in one tensor ({key}), and engines read only dense ones so"


class ExportFormat(ABC):
    """One layout of files, for one or several engines. Stateless.

    Attributes:
        name: what ``format=`` is given.
        holds: what it holds, in words.
        engines: what reads it.
        approximations: what ``approximate=`` may be.
        needs_tokenizer: the files hold the tokenizer too.
        is_of_decoders: its engines read language models of text that have a decoder only.
        adapter_form: how an adapter beside the model is written; None where its engines read none.
        max_rank: of such an adapter.
        is_read_here: transformers, with this package, loads it as any model.
        dtypes: that dense tensors, scales and zeros may have; None for any.
        bytes_per_weight: that writing takes at most, beside the bytes of the source.
    """

    name: ClassVar[str]
    holds: ClassVar[str]
    engines: ClassVar[tuple[str, ...]]
    approximations: ClassVar[tuple[Approximation, ...]] = ()
    needs_tokenizer: ClassVar[bool] = False
    is_of_decoders: ClassVar[bool] = True
    adapter_form: ClassVar[AdapterForm | None] = "peft"
    max_rank: ClassVar[int] = MAX_RANK
    is_read_here: ClassVar[bool] = False
    dtypes: ClassVar[tuple[torch.dtype, ...] | None] = None
    bytes_per_weight: ClassVar[float] = 1.0

    def check_installation(self) -> None:  # noqa: B027  most need nothing
        """Raise ImportError, with the pip line, if something that writing needs is not there."""

    @abstractmethod
    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        """Why a layer cannot be held, to follow its name; empty if it can."""

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        """Why quantized experts cannot be held, to follow their name; empty if they can, as far as :meth:`misfit`
        allows."""
        return f"{self.name} has no place for quantized experts"

    def model_misfit(
        self, facts: Sequence[LayerFacts], dense_linears: Collection[str], approximate: Approximation | None
    ) -> str:
        """Why these layers, and dense linear modules of these names, cannot be held together; empty if they can."""
        return ""

    def config_misfit(self, config: Mapping[str, Any]) -> str:
        """What engines compute otherwise than a model of this config.json, whatever a file says; empty for nothing."""
        return ""

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype in which a model of ``dtype`` is written where the caller asks for none."""
        return dtype

    @abstractmethod
    def write(self, task: ExportTask) -> Written:
        """Write the tensors of ``task`` into its folder."""

    @abstractmethod
    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        """Starts an engine with the model in ``folder`` and the adapter in the folder or file ``adapter``.

        Args:
            folder: the exported one.
            adapter: None for none.
            rank: the largest of the adapter's layers.
        """

    def __str__(self) -> str:
        return f"{self.name}: {self.holds}; for {', '.join(self.engines)}"
