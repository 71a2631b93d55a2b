"""Dense safetensors: what every engine reads, and what holds weights of any method."""

from __future__ import annotations

import torch
from torch import Tensor

from ...methods import get_method
from ..config_json import engine_config
from ..sharded_writer import ShardedWriter
from ..source_layer import Matrix, SourceLayer, StackFacts, weight_of
from .format_base import Approximation, Comparison, ExportFormat, ExportTask, LayerFacts, Written
from .vllm_command import vllm_command


class DenseFormat(ExportFormat):
    """Each quantized weight dequantized, with its low-rank branch in it."""

    name = "dense"
    holds = "weights of any method, dequantized to 16 or 32 bits"
    engines = ("all",)
    is_read_here = True
    is_of_decoders = False
    bytes_per_weight = 4.0

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        return ""

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        return ""

    def write(self, task: ExportTask) -> Written:
        writer = ShardedWriter(task.folder)
        written = Written(layers=[])
        for layer in task.source.layers.values():
            comparison = Comparison(task, layer)
            for name, tensor in layer.float_tensors(_Weights(task, layer, comparison).dense):
                writer.add(name, tensor)
            written.layers.append(
                comparison.result(stored_as=str(task.dtype).removeprefix("torch."), bits_after=8 * task.dtype.itemsize)
            )
        for name, tensor in task.source.dense_tensors(task.dtype):
            writer.add(name, tensor)
        writer.close()
        written.config = engine_config(task.source.config, task.dtype)
        return written

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return vllm_command(folder, adapter=adapter, rank=rank)


class _Weights:
    """The dense matrices of a layer, branches in them, compared with what they were without."""

    def __init__(self, task: ExportTask, layer: SourceLayer, comparison: Comparison) -> None:
        self._task, self._layer, self._comparison = task, layer, comparison
        self._weight = layer.weight()
        self._branch = None if layer.branch is None else layer.branch()

    def dense(self, matrix: Matrix) -> Tensor:
        """(rows, in_features) in the task's dtype; ValueError, naming it, where that cannot hold it."""
        quantized = weight_of(self._weight, matrix)
        weight = get_method(quantized.spec.method).dequantize(quantized, dtype=torch.float32)[matrix.rows]
        branch: Tensor | float = 0.0
        if self._branch is not None:
            A, B = (part if matrix.expert is None else part[matrix.expert] for part in self._branch)
            branch = B[matrix.rows].float() @ A.float()
        stored = (weight + branch).to(self._task.dtype)
        if not torch.isfinite(stored).all():
            raise ValueError(
                f"{matrix.name}: {self._task.dtype} cannot hold its weights. Export with dtype=torch.float32."
            )
        self._comparison.add(matrix, stored.float() - branch)
        return stored
