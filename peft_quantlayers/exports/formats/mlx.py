"""MLX: ``scale * code + bias``, for mlx-lm. Bit strings, scales and biases; each layer may have its own width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..grids import UniformGrid
from ..packing import pack_rows
from .base import ANY_RANK
from .grid_format import GridFormat, GridSettings, StoredGrid


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


def _fields(settings: GridSettings) -> dict[str, Any]:
    return {"group_size": settings.group_size, "bits": settings.nbits, "mode": "affine"}
