"""Gradients of AQLM's codebooks and scales from that of the dense weight, which comes tile by tile."""

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..tiled import WeightTiles
from .tiles import flat_index


def metadata_gradient(
    gradient_tiles: WeightTiles, codes: Tensor, codebooks: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of codebooks and scales, in the dtypes of ``codebooks`` and ``scales``.

    Args:
        gradient_tiles: ranges of rows, whole groups of outputs, with their part (n_rows, in_features), floating.
        codes, codebooks, scales: as for :func:`.op.aqlm_dequantize`.
    """
    num_codebooks, size, out_group, in_group = codebooks.shape
    n_in = codes.shape[1]
    table = codebooks.float().reshape(num_codebooks * size, -1)
    grad_table, grad_scales = torch.zeros_like(table), table.new_empty(len(codes))
    for rows, tile in gradient_tiles:
        part = slice(rows.start // out_group, rows.stop // out_group)
        groups = tile.float().reshape(-1, out_group, n_in, in_group).transpose(1, 2).flatten(2)
        index = flat_index(codes[part], size)
        unscaled = embedding_bag(index, table, mode="sum").view(groups.shape)
        grad_scales[part] = unscaled.mul_(groups).sum((1, 2))
        scaled = (groups * scales[part].float().view(-1, 1, 1)).flatten(0, 1)
        for m in range(num_codebooks):
            grad_table.index_add_(0, index[:, m], scaled)
    return grad_table.view(codebooks.shape).to(codebooks.dtype), grad_scales.view(scales.shape).to(scales.dtype)
