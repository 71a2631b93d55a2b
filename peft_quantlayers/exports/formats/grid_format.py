"""Formats that hold codes, scales and zeros as tensors in safetensors files: all but their layouts is the same."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...formats import QuantizedWeight
from ..config_json import engine_config
from ..export_report import LayerExport
from ..sharded_writer import ShardedWriter
from ..source_layer import Matrix, SourceLayer, weight_of
from ..uniform_grid import UniformGrid, in_eight_bits, uniform_grid, with_rounded_zeros
from .format_base import Approximation, Comparison, ExportFormat, ExportTask, LayerFacts, LowRank, Written

# Projections of one block that vLLM and SGLang compute as one layer, which has one layout.
_FUSED = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
}  # fmt: skip
# Of the fused weights of all experts, and of the projections of one: they are one layer there, too.
_EXPERT = re.compile(r"(.*\.experts)\.(\d+\.)?[^.]+")


@dataclass(frozen=True, kw_only=True)
class GridSettings:
    """How one layer is stored: what a config says of it."""

    nbits: int
    group_size: int
    is_symmetric: bool


@dataclass(frozen=True, kw_only=True)
class StoredGrid:
    """One layer as a format stores it.

    Fields:
        tensors: by the last part of their names.
        weight: (out_features, in_features), float32, what readers compute from the tensors.
        settings: for the config.
    """

    tensors: dict[str, Tensor]
    weight: Tensor
    settings: GridSettings


class GridFormat(ExportFormat):
    """A layout of codes, scales and zeros.

    Attributes:
        widths: bits per code that it holds.
        group_sizes: that its readers take; larger groups are divided, other sizes are refused. None for any.
        has_float_zeros: whether zeros may be any numbers; :meth:`holds_float_zeros` where that depends on the width.
        is_fused_by_engine: whether layers that vLLM fuses must be stored alike.
        has_one_setting: whether all layers must be stored alike.
        expert_widths: bits per code of experts; None for those of all layers.
        are_experts_symmetric: whether experts must have the middle code as zero.
        are_experts_stacked: whether the matrices of :meth:`matrices` with one name are stored as one tensor.
    """

    widths: ClassVar[tuple[int, ...]]
    group_sizes: ClassVar[tuple[int, ...] | None] = None
    has_float_zeros: ClassVar[bool] = False
    is_fused_by_engine: ClassVar[bool] = False
    has_one_setting: ClassVar[bool] = False
    expert_widths: ClassVar[tuple[int, ...] | None] = None
    are_experts_symmetric: ClassVar[bool] = False
    are_experts_stacked: ClassVar[bool] = False

    @abstractmethod
    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        """The tensors of one layer."""

    @abstractmethod
    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        """What config.json says of the layers in ``settings`` and of the linear modules that are dense."""

    # ---- what fits

    def holds_float_zeros(self, nbits: int) -> bool:
        """Whether zeros of codes of ``nbits`` may be any numbers."""
        return self.has_float_zeros

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        if not facts.is_uniform and approximate != "requantize":
            reason = "groups along the outputs (axis=0)" if facts.method == "hqq" else f"{facts.method} weights"
            return f"{self.name} has no place for {reason}"
        if facts.is_transposed:
            return f"it is a Conv1D, which keeps its weight transposed, and readers of {self.name} take none"
        if approximate == "requantize":
            return ""
        nbits = 8 if approximate == "8bit" else facts.nbits
        if nbits not in self.widths:
            return f"{self.name} holds {_listed(self.widths)} bits per code, not {nbits}"
        if self.stored_group_size(facts.group_size) is None:
            sizes = _listed(self.group_sizes or ())
            return f"{self.name} holds groups of {sizes} and multiples of these, not of {facts.group_size}"
        if not self.holds_float_zeros(nbits) and not facts.has_code_zeros and approximate is None:
            return f"its zeros are no integers from 0 to {2**facts.nbits - 1}, and {self.name} holds no others"
        return self.shape_misfit(facts, nbits)

    def shape_misfit(self, facts: LayerFacts, nbits: int) -> str:
        """Why a shape cannot be packed; empty if it can."""
        if facts.in_features * nbits % 32:
            return f"a row of in_features={facts.in_features} codes of {nbits} bits does not fill words of 32 bits"
        return ""

    def model_misfit(
        self, facts: Sequence[LayerFacts], dense_linears: Collection[str], approximate: Approximation | None
    ) -> str:
        kinds = {each.name: self.kind(each, approximate) for each in facts}
        if self.has_one_setting and len(set(kinds.values())) > 1:
            return f"{self.name} has one width and group size for all layers, and these have {_kinds(kinds)}"
        if self.is_fused_by_engine:
            fused: dict[str, dict[str, Any]] = {}
            for name, kind in kinds.items():
                fused.setdefault(fused_name(name), {})[name] = kind
            for name in dense_linears:
                if parts := fused.get(fused_name(name)):
                    return f"engines compute {', '.join(parts)} and {name} as one layer, and {name} is dense"
            for parts in fused.values():
                if len(set(parts.values())) > 1:
                    return (
                        f"engines compute {', '.join(parts)} as one layer, which has one width and group size, and "
                        f"these have {_kinds(parts)}"
                    )
        return ""

    def kind(self, facts: LayerFacts, approximate: Approximation | None) -> tuple[int, int | None]:
        """Bits per code and group size in which a layer is stored."""
        return 8 if approximate == "8bit" else facts.nbits, self.stored_group_size(facts.group_size)

    def stored_group_size(self, group_size: int) -> int | None:
        """The size of group in which groups of ``group_size`` are stored; None where there is none."""
        if self.group_sizes is None or group_size in self.group_sizes:
            return group_size
        return next((size for size in sorted(self.group_sizes, reverse=True) if group_size % size == 0), None)

    # ---- writing

    def write(self, task: ExportTask) -> Written:
        self._refuse_half_dense_experts(task)
        writer = ShardedWriter(task.folder)
        written = Written(layers=[])
        settings: dict[str, GridSettings] = {}
        for layer in task.source.layers.values():
            written.layers.append(self._write_layer(task, layer, writer, settings, written.low_rank))
        for name, tensor in task.source.dense_tensors(task.dtype):
            for own_name, own_tensor in self.dense_tensors(name, tensor, task.facts.values()):
                writer.add(own_name, own_tensor)
        writer.close()
        written.notes += self.notes(settings)
        config = engine_config(task.source.config, task.dtype)
        dense = [*task.source.dense_linears, *map(self.ignored_experts, task.source.dense_experts)]
        written.config = config | self.config_fields(self.quantization_config(settings, dense))
        return written

    def _refuse_half_dense_experts(self, task: ExportTask) -> None:
        stacks = [layer for layer in task.source.layers.values() if layer.stack]
        quantized, dense = {fused_name(layer.matrices[0].name) for layer in stacks}, set(task.source.dense_experts)
        if reason := self.experts_misfit(quantized, dense):
            raise ValueError(
                f"{self.name} cannot hold this model, and nothing was written: {reason}. Quantize all experts, or "
                "leave them all dense with skip_modules=['experts']."
            )

    def experts_misfit(self, quantized: Set[str], dense: Set[str]) -> str:
        """Why modules of experts with these quantized and dense weights cannot be held together; empty if they can."""
        both = quantized & dense
        return (
            f"{min(both)} is one layer in engines, and some of its weights are quantized and some dense"
            if both
            else ""
        )

    def _write_layer(
        self,
        task: ExportTask,
        layer: SourceLayer,
        writer: ShardedWriter,
        settings: dict[str, GridSettings],
        low_rank: dict[str, LowRank],
    ) -> LayerExport:
        """Write one layer; what it is, and what it leaves to an adapter, go into ``settings`` and ``low_rank``."""
        weight, comparison = task.weight(layer), Comparison(task, layer)
        tensors: dict[str, list[Tensor]] = {}
        n_bytes = 0
        for matrix in self.matrices(layer):
            stored, correction = self.stored(task, layer, weight, matrix)
            if correction is not None:
                low_rank[layer.name] = correction
            for part, tensor in stored.tensors.items():
                tensors.setdefault(f"{matrix.name}.{part}", []).append(tensor)
                n_bytes += tensor.nbytes
            comparison.add(
                matrix, stored.weight if correction is None else stored.weight + correction[1] @ correction[0]
            )
            settings[matrix.name] = stored.settings
        for name, parts in tensors.items():
            writer.add(name, torch.stack(parts) if layer.stack and self.are_experts_stacked else parts[0])
        kept = " and an adapter" if layer.name in low_rank else ""
        stored_as = f"{stored.settings.nbits} bits in groups of {stored.settings.group_size}{kept}"
        return comparison.result(stored_as=stored_as, bits_after=8 * n_bytes / layer.n_weights)

    def stored(
        self, task: ExportTask, layer: SourceLayer, weight: QuantizedWeight, matrix: Matrix
    ) -> tuple[StoredGrid, LowRank | None]:
        """``matrix`` of a layer of ``weight`` as it is written, and what an adapter is to restore of it."""
        grid = uniform_grid(weight_of(weight, matrix)).rows(matrix.rows)
        correction: LowRank | None = None
        if task.approximate == "8bit":
            grid = in_eight_bits(grid)
        elif task.approximate == "adapter" and not task.facts[layer.name].has_code_zeros:
            grid, A, B = with_rounded_zeros(grid)
            correction = A, B
        group_size = self.stored_group_size(grid.group_size) or grid.group_size
        return self.store(grid.with_groups_of(group_size), task.dtype), correction

    def matrices(self, layer: SourceLayer) -> Sequence[Matrix]:
        """What is stored of a layer, in order."""
        return layer.matrices

    def dense_tensors(self, name: str, tensor: Tensor, facts: Collection[LayerFacts]) -> Iterable[tuple[str, Tensor]]:
        """What is stored of a dense tensor of the model."""
        return [(name, tensor)]

    def ignored_experts(self, module: str) -> str:
        """How a config names an experts module that is dense among its dense linear modules."""
        return module

    def notes(self, settings: Mapping[str, GridSettings]) -> list[str]:
        """What a user should know about layers of these settings, in sentences."""
        return []

    def config_fields(self, quantization: dict[str, Any]) -> dict[str, Any]:
        """Where in config.json ``quantization`` stands."""
        return {"quantization_config": quantization}


def fused_name(name: str) -> str:
    """The name under which vLLM and SGLang know the layer ``name``, which they may compute with others."""
    experts = _EXPERT.match(name)
    if experts:
        return experts[1]
    parent, _, last = name.rpartition(".")
    return f"{parent}.{_FUSED.get(last, last)}" if parent else _FUSED.get(last, last)


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _kinds(kinds: Mapping[str, tuple[int, int | None]]) -> str:
    distinct = sorted({(nbits, group or 0) for nbits, group in kinds.values()})
    return " and ".join(f"{nbits} bits in groups of {group}" for nbits, group in distinct)
