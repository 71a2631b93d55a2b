"""Dense safetensors: what every engine reads, and what holds weights of any method."""

from __future__ import annotations

import torch

from ...methods import get_method
from ..config_json import engine_config
from ..shards import ShardedWriter
from .base import Approximation, ExportFormat, ExportTask, LayerFacts, Written, compared
from .vllm_command import vllm_command


class DenseFormat(ExportFormat):
    """Each quantized weight dequantized, with its low-rank branch in it."""

    name = "dense"
    holds = "weights of any method, dequantized to 16 or 32 bits"
    engines = ("all",)
    is_of_decoders = False
    bytes_per_weight = 4.0

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        return ""

    def write(self, task: ExportTask) -> Written:
        writer = ShardedWriter(task.folder)
        written = Written(layers=[])
        for name, layer in task.source.layers.items():
            quantized = layer.weight()
            weight = get_method(quantized.spec.method).dequantize(quantized, dtype=torch.float32)
            branch: torch.Tensor | float = 0.0
            if layer.branch is not None:
                A, B = layer.branch()
                branch = B.float() @ A.float()
            stored = weight.add_(branch).to(task.dtype)
            if not torch.isfinite(stored).all():
                raise ValueError(f"{name}: {task.dtype} cannot hold its weights. Export with dtype=torch.float32.")
            writer.add(f"{name}.weight", stored.t() if layer.is_transposed else stored)
            written.layers.append(
                compared(
                    task,
                    layer,
                    stored.float() - branch,
                    stored_as=str(task.dtype).removeprefix("torch."),
                    bits_after=8 * task.dtype.itemsize,
                )
            )
        for name, tensor in task.source.dense_tensors(task.dtype):
            writer.add(name, tensor)
        writer.close()
        written.config = engine_config(task.source.config, task.dtype)
        return written

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return vllm_command(folder, adapter=adapter, rank=rank)
