"""MLX: ``scale * code + bias``, for mlx-lm. Bit strings, scales and biases; each layer may have its own width."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from ..bit_strings import pack_rows
from ..source_layer import Matrix, SourceLayer, StackFacts
from ..uniform_grid import UniformGrid
from .format_base import ANY_RANK, Approximation, LayerFacts
from .grid_format import GridFormat, GridSettings, StoredGrid

# What mlx-lm's models of these types call the module that transformers calls ``experts``.
_EXPERTS = dict.fromkeys(
    ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "granitemoe"), "switch_mlp"
) | {"gpt_oss": "experts"}

# Models whose ``kv_b_proj`` mlx-lm keeps as two matrices, one of them transposed.
_SPLITTING = ("deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_linear", "longcat_flash", "mistral4")


class MlxFormat(GridFormat):
    """``weight``, uint32 (out_features, in_features * bits / 32), ``scales`` and ``biases`` (out_features, n_groups).

    Source: ``mlx.core.quantize``, mode "affine". A bias is ``-scale * zero``, so that it alone is rounded.
    """

    name = "mlx"
    holds = "1 to 6 and 8 bits with float zeros, groups of 32, 64, 128 and multiples, each layer its own"
    engines = ("mlx-lm", "LM Studio on Apple silicon")
    widths = (1, 2, 3, 4, 5, 6, 8)
    group_sizes = (32, 64, 128)
    has_float_zeros = True
    adapter_form = "mlx"
    max_rank = ANY_RANK
    are_experts_stacked = True

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        if facts.model_type in _EXPERTS:
            return ""
        return f"how mlx-lm keeps experts is known here for {', '.join(_EXPERTS)}, not for {facts.model_type}"

    def misfit(self, facts: LayerFacts, approximate: Approximation | None) -> str:
        if facts.model_type in _SPLITTING and facts.name.endswith(".kv_b_proj"):
            return "mlx-lm splits it and quantizes it again as it loads it: leave it dense, skip_modules=['kv_b_proj']"
        return super().misfit(facts, approximate)

    def experts_misfit(self, quantized: Set[str], dense: Set[str]) -> str:
        is_mixed = bool(quantized and dense)
        return "mlx-lm reads the experts of all blocks in one form, and some are quantized" if is_mixed else ""

    def matrices(self, layer: SourceLayer) -> Sequence[Matrix]:
        """Gate and up by themselves, each of all experts one after the other."""
        stack = layer.stack
        if stack is None:
            return layer.matrices
        return [
            Matrix(name=f"{_experts_module(stack, layer.model_type)}.{projection}", expert=expert, rows=rows)
            for projection, rows in _projections(stack, layer.out_features).items()
            for expert in range(stack.n_experts)
        ]

    def dense_tensors(self, name: str, tensor: Tensor, facts: Collection[LayerFacts]) -> Iterable[tuple[str, Tensor]]:
        """Biases of experts are split as the weights are."""
        parent, _, last = name.rpartition(".")
        for each in facts:
            if each.stack and last == f"{each.stack.parameter}_bias" and each.name.rpartition(".")[0] == parent:
                module = _experts_module(each.stack, each.model_type)
                projections = _projections(each.stack, each.out_features)
                return [(f"{module}.{part}.bias", tensor[:, rows]) for part, rows in projections.items()]
        return [(name, tensor)]

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """float16 for bfloat16, which would round the biases eight times as coarsely."""
        return torch.float16 if dtype == torch.bfloat16 else dtype

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        scales, biases = grid.scale.to(dtype), (-grid.scale * grid.zero).to(dtype)
        groups = grid.codes.float().view(*grid.scale.shape, -1)
        weight = groups * scales.float().unsqueeze(-1) + biases.float().unsqueeze(-1)
        return StoredGrid(
            tensors={
                "weight": pack_rows(grid.codes, grid.nbits).view(torch.uint32),
                "scales": scales,
                "biases": biases,
            },
            weight=weight.view(grid.codes.shape),
            settings=GridSettings(nbits=grid.nbits, group_size=grid.group_size, is_symmetric=False),
        )

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        ((most, _),) = Counter(settings.values()).most_common(1)
        own = {name: _fields(each) for name, each in settings.items() if each != most}
        return _fields(most) | own

    def config_fields(self, quantization: dict[str, Any]) -> dict[str, Any]:
        return {"quantization": quantization, "quantization_config": quantization}

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        with_adapter = f" --adapter-path {adapter}" if adapter else ""
        return f"mlx_lm.server --model {folder}{with_adapter}"


def _experts_module(stack: StackFacts, model_type: str) -> str:
    """The module of the experts in mlx-lm's model."""
    block = re.split(r"\.(?:experts|input_linear|output_linear)\b", stack.tensors[0].key)[0]
    return f"{block}.{_EXPERTS[model_type]}"


def _projections(stack: StackFacts, out_features: int) -> dict[str, slice]:
    """The rows of each projection in a fused weight."""
    if not stack.has_gate:
        return {stack.parameter: slice(0, out_features)}
    if stack.is_interleaved:
        return {"gate_proj": slice(0, out_features, 2), "up_proj": slice(1, out_features, 2)}
    return {"gate_proj": slice(0, out_features // 2), "up_proj": slice(out_features // 2, out_features)}


def _fields(settings: GridSettings) -> dict[str, Any]:
    return {"group_size": settings.group_size, "bits": settings.nbits, "mode": "affine"}
