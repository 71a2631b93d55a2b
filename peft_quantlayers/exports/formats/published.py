"""The layouts in which HQQ and AQLM models were published: for the packages of those methods."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from ...formats import QuantizedWeight, QuantSpec
from ...formats.checkpoint_format import ModelDescription
from ...formats.published_aqlm import PublishedAqlmFormat
from ...formats.published_hqq_writer import published_hqq_misfit, published_hqq_tensors
from ...methods import AQLMSpec, get_method
from ..config_json import engine_config
from ..sharded_writer import ShardedWriter
from ..source_layer import StackFacts, part_of
from .format_base import Approximation, Comparison, ExportFormat, ExportTask, LayerFacts, Written, why_not_single


class _PublishedFormat(ExportFormat):
    """A layout of one method, which holds its tensors unchanged."""

    is_read_here = True
    is_of_decoders = False

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        if facts.method != self.name:
            return f"{self.name} holds no {facts.method} weights"
        if facts.is_transposed:
            return f"it is a Conv1D, and the {self.name} package replaces nn.Linear only"
        return ""

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        return why_not_single(stack)

    @abstractmethod
    def tensors(self, weight: QuantizedWeight, task: ExportTask) -> dict[str, Tensor]:
        """The tensors of one linear layer by the last part of their names."""

    @abstractmethod
    def quantization_config(self, task: ExportTask) -> dict[str, Any]:
        """What config.json says of all layers."""

    def write(self, task: ExportTask) -> Written:
        writer = ShardedWriter(task.folder)
        written = Written(layers=[])
        for layer in task.source.layers.values():
            weight, comparison, n_bytes = layer.weight(), Comparison(task, layer), 0
            for matrix in layer.matrices:
                part = part_of(weight, matrix)
                for name, tensor in self.tensors(part, task).items():
                    writer.add(f"{matrix.name}.{name}", tensor)
                    n_bytes += tensor.nbytes
                comparison.add(matrix, get_method(part.spec.method).dequantize(part, dtype=torch.float32))
            bits = 8 * n_bytes / layer.n_weights
            written.layers.append(comparison.result(stored_as=f"{self.name} as published", bits_after=bits))
        for name, tensor in task.source.dense_tensors(task.dtype):
            writer.add(name, tensor)
        writer.close()
        config = engine_config(task.source.config, task.dtype)
        written.config = config | {"quantization_config": self.quantization_config(task)}
        return written


class HqqFormat(_PublishedFormat):
    """As transformers 4 saved models of the ``hqq`` package: settings lie beside each layer's tensors."""

    name = "hqq"
    holds = "HQQ weights, each layer its own width, groups and axis"
    engines = ("hqq", "transformers 4")

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        reason = super().misfit(facts, approximate)
        return reason or published_hqq_misfit(facts.spec, facts.out_features, facts.in_features)

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        spec: Any = facts.spec
        if stack.has_gate and facts.method == self.name and spec.axis == 0:
            return "groups along the outputs (axis=0) hold gate and up together, which are layers of their own there"
        return super().stack_misfit(facts, stack, approximate)

    def tensors(self, weight: QuantizedWeight, task: ExportTask) -> dict[str, Tensor]:
        return published_hqq_tensors(weight, task.dtype)

    def quantization_config(self, task: ExportTask) -> dict[str, Any]:
        spec: Any = next(iter(task.source.layers.values())).spec
        params = {
            "nbits": spec.nbits, "channel_wise": True, "group_size": spec.group_size, "optimize": True,
            "round_zero": spec.round_zero, "axis": spec.axis, "view_as_float": False,
        }  # fmt: skip
        config = {
            "weight_quant_params": params, "scale_quant_params": None, "zero_quant_params": None,
            "offload_meta": False,
        }  # fmt: skip
        return {"quant_method": "hqq", "quant_config": config, "skip_modules": task.source.dense_linears}

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return f"python -c \"from transformers import pipeline; pipeline('text-generation', '{folder}')\""


class AqlmFormat(_PublishedFormat):
    """As the ``aqlm`` package's own checkpoints: one scheme for all layers."""

    name = "aqlm"
    holds = "AQLM weights of one scheme"
    engines = ("aqlm with transformers",)

    def tensors(self, weight: QuantizedWeight, task: ExportTask) -> dict[str, Tensor]:
        # Gate and up of an expert have the same codebooks, and files hold no tensor twice.
        return {name: tensor.clone() for name, tensor in weight.tensors.items()}

    def model_misfit(
        self, facts: Sequence[LayerFacts], dense_linears: Collection[str], approximate: Approximation | None
    ) -> str:
        return PublishedAqlmFormat().can_hold(_description(facts, ())) or ""

    def quantization_config(self, task: ExportTask) -> dict[str, Any]:
        return PublishedAqlmFormat().write(_description(list(task.facts.values()), task.source.dense_linears))

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return f"python -c \"from transformers import pipeline; pipeline('text-generation', '{folder}')\""


def _description(facts: Sequence[LayerFacts], dense_linears: Sequence[str]) -> ModelDescription:
    specs = {each.name: each.spec if each.stack is None else _without_parts(each.spec) for each in facts}
    return ModelDescription(specs=specs, dense_linears=tuple(dense_linears))


def _without_parts(spec: QuantSpec) -> QuantSpec:
    """The spec of the parts of an expert, which are layers of their own here."""
    return dataclasses.replace(spec, row_parts=1) if isinstance(spec, AQLMSpec) else spec
