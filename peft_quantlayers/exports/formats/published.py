"""The layouts in which HQQ and AQLM models were published: for the packages of those methods."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from ...formats.checkpoint_format import ModelDescription
from ...formats.published_aqlm import PublishedAqlmFormat
from ...formats.published_hqq_writer import published_hqq_misfit, published_hqq_tensors
from ...methods import get_method
from ..config_json import engine_config
from ..shards import ShardedWriter
from ..source import SourceLayer
from .base import Approximation, ExportFormat, ExportTask, LayerFacts, Written, compared


class _PublishedFormat(ExportFormat):
    """A layout of one method, which holds its tensors unchanged."""

    is_of_decoders = False

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        if facts.method != self.name:
            return f"{self.name} holds no {facts.method} weights"
        if facts.is_transposed:
            return f"it is a Conv1D, and the {self.name} package replaces nn.Linear only"
        return ""

    @abstractmethod
    def tensors(self, layer: SourceLayer, task: ExportTask) -> dict[str, Tensor]:
        """The tensors of one layer by the last part of their names."""

    @abstractmethod
    def quantization_config(self, task: ExportTask) -> dict[str, Any]:
        """What config.json says of all layers."""

    def write(self, task: ExportTask) -> Written:
        writer = ShardedWriter(task.folder)
        written = Written(layers=[])
        for name, layer in task.source.layers.items():
            tensors = self.tensors(layer, task)
            for part, tensor in tensors.items():
                writer.add(f"{name}.{part}", tensor)
            quantized = layer.weight()
            weight = get_method(quantized.spec.method).dequantize(quantized)
            bits = 8 * sum(tensor.nbytes for tensor in tensors.values()) / layer.n_weights
            written.layers.append(
                compared(task, layer, weight, stored_as=f"{self.name} as published", bits_after=bits)
            )
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

    def tensors(self, layer: SourceLayer, task: ExportTask) -> dict[str, Tensor]:
        return published_hqq_tensors(layer.weight(), task.dtype)

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

    def tensors(self, layer: SourceLayer, task: ExportTask) -> dict[str, Tensor]:
        return dict(layer.weight().tensors)

    def model_misfit(
        self, facts: Sequence[LayerFacts], dense_linears: Collection[str], approximate: Approximation | None
    ) -> str:
        return PublishedAqlmFormat().can_hold(_description(facts, ())) or ""

    def quantization_config(self, task: ExportTask) -> dict[str, Any]:
        return PublishedAqlmFormat().write(_description(list(task.facts.values()), task.source.dense_linears))

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return f"python -c \"from transformers import pipeline; pipeline('text-generation', '{folder}')\""


def _description(facts: Sequence[LayerFacts], dense_linears: Sequence[str]) -> ModelDescription:
    return ModelDescription(specs={each.name: each.spec for each in facts}, dense_linears=tuple(dense_linears))
