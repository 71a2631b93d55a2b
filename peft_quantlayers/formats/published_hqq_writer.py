"""Writes an HQQ layer as transformers 4 with the ``hqq`` package wrote it: the inverse of :mod:`.published_hqq`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .published_hqq import PACKINGS
from .quantized_weight import QuantizedWeight

_PACKING_OF_NBITS = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 5: "8bit_u8", 6: "8bit_u8", 8: "8bit_u8"}


def published_hqq_misfit(spec: Any, out_features: int, in_features: int) -> str:
    """Why hqq cannot pack a weight of this HQQ spec and shape; empty if it can. It fills whole words with rows."""
    packing = _PACKING_OF_NBITS[spec.nbits]
    rows = _rows(spec, out_features, in_features)
    if packing != "3bit_32" and rows % PACKINGS[packing][1]:  # 3 bits are padded
        return f"hqq packs {PACKINGS[packing][1]} rows of groups into one, and the weight has {rows}"
    return ""


def published_hqq_tensors(weight: QuantizedWeight, compute_dtype: torch.dtype) -> dict[str, Tensor]:
    """The entries of one layer by their short names: ``W_q``, ``scale``, ``zero`` and the settings as small tensors.

    Args:
        weight: an HQQ weight, whose shape :func:`published_hqq_misfit` accepts.
        compute_dtype: the dtype that the layer computes in.
    """
    spec: Any = weight.spec
    n_groups = weight.tensors["scale"].numel()
    group_size = weight.out_features * weight.in_features // n_groups
    packing = _PACKING_OF_NBITS[spec.nbits]
    rows = _rows(spec, weight.out_features, weight.in_features)
    metadata_shape = (n_groups, 1) if spec.axis == 1 else (1, n_groups)
    settings = {
        "nbits": spec.nbits,
        "group_size": group_size,
        "shape": torch.tensor((weight.out_features, weight.in_features)),
        "axis": spec.axis,
        "packing": packing,
        "unpack_view_dtype": str(PACKINGS[packing][0]),
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": str(compute_dtype),
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": bool(spec.round_zero),
    }
    return {
        "W_q": _pack(weight.codes().reshape(rows, -1), packing),
        "scale": weight.tensors["scale"].reshape(metadata_shape),
        "zero": weight.tensors["zero"].reshape(metadata_shape),
    } | {name: _encoded(value) for name, value in settings.items()}


def _rows(spec: Any, out_features: int, in_features: int) -> int:
    """Rows of the matrix of groups: one per group (``axis=1``), or one per place in a group."""
    n_groups = spec.n_groups(out_features, in_features)
    return out_features * n_groups if spec.axis == 1 else out_features // n_groups


def _pack(codes: Tensor, packing: str) -> Tensor:
    """Codes (rows, columns) in words, the first block of rows in the highest bits."""
    word, per_word, nbits = PACKINGS[packing]
    n_rows = -(-len(codes) // per_word)
    padded = torch.zeros(n_rows * per_word, codes.shape[1], dtype=word)
    padded[: len(codes)] = codes.to(word)
    packed = torch.zeros(n_rows, codes.shape[1], dtype=word)
    for block, rows in enumerate(padded.split(n_rows)):
        packed |= rows << (nbits * (per_word - 1 - block))
    return packed


def _encoded(value: Any) -> Tensor:
    """A setting as hqq's ``encode_safetensor_type`` stores it."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        return torch.tensor(list(value.encode("ascii")), dtype=torch.uint8)
    return torch.tensor(int(value), dtype=torch.uint8 if isinstance(value, bool) else torch.int32)
