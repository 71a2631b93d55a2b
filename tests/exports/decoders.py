"""Decodes exported tensors in numpy, from the readers' specifications and from nothing of ours."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in ``folder``."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    return found


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def bit_string(words: torch.Tensor, nbits: int, columns: int) -> np.ndarray:
    """Rows of codes from rows of little-endian words of 32 bits, least significant bit first."""
    octets = np.ascontiguousarray(words.view(torch.int32).numpy()).view(np.uint8)
    bits = np.unpackbits(octets, axis=1, bitorder="little")[:, : columns * nbits]
    return (bits.reshape(len(octets), columns, nbits) * (1 << np.arange(nbits))).sum(-1)


def _spread(groups: np.ndarray, columns: int) -> np.ndarray:
    return groups.repeat(columns // groups.shape[1], axis=1)


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def mlx_weight(tensors: dict, name: str, nbits: int, columns: int) -> np.ndarray:
    codes = bit_string(tensors[f"{name}.weight"], nbits, columns)
    scales, biases = (_spread(_numpy(tensors[f"{name}.{part}"]), columns) for part in ("scales", "biases"))
    return codes * scales + biases


def humming_weight(tensors: dict, name: str, nbits: int, columns: int) -> np.ndarray:
    codes = bit_string(tensors[f"{name}.weight"], nbits, columns)
    scale, zero = (_spread(_numpy(tensors[f"{name}.{part}"]), columns) for part in ("weight_scale", "zero_point"))
    return (codes - zero) * scale


def compressed_tensors_weight(tensors: dict, name: str, nbits: int) -> np.ndarray:
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = bit_string(tensors[f"{name}.weight_packed"], nbits, columns)
    scale = _numpy(tensors[f"{name}.weight_scale"])
    zero = np.full(scale.shape, 1 << (nbits - 1))
    if f"{name}.weight_zero_point" in tensors:
        zero = bit_string(tensors[f"{name}.weight_zero_point"].t().contiguous(), nbits, rows).T
    return (codes - _spread(zero, columns)) * _spread(scale, columns)


def gptq_weight(tensors: dict, name: str, nbits: int, *, is_first_version: bool = False) -> np.ndarray:
    columns, rows = len(tensors[f"{name}.g_idx"]), tensors[f"{name}.scales"].shape[1]
    codes = bit_string(tensors[f"{name}.qweight"].t().contiguous(), nbits, columns)
    zeros = bit_string(tensors[f"{name}.qzeros"], nbits, rows) + is_first_version
    groups = tensors[f"{name}.g_idx"].numpy()
    return (codes - zeros.T[:, groups]) * _numpy(tensors[f"{name}.scales"]).T[:, groups]


def awq_weight(tensors: dict, name: str) -> np.ndarray:
    def unpacked(words: torch.Tensor) -> np.ndarray:
        rows, n_words = words.shape
        found = np.zeros((rows, n_words * 8), dtype=np.int64)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):  # of AutoAWQ's pack
            found[:, column::8] = (words.numpy() >> (4 * place)) & 15
        return found

    codes, zeros = unpacked(tensors[f"{name}.qweight"]), unpacked(tensors[f"{name}.qzeros"])
    scales = _numpy(tensors[f"{name}.scales"])
    repeats = len(codes) // len(scales)
    return ((codes - zeros.repeat(repeats, axis=0)) * scales.repeat(repeats, axis=0)).T


def tensors_of_file(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
