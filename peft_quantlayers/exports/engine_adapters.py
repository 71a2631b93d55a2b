"""Writes an adapter in the form of each engine. Called with factors that :mod:`.adapters` read, joined and padded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .adapters import CONFIG, WEIGHTS, Adapter

_LAYER = re.compile(r"(.*?\.)(\d+)\.(.+)")


def write_peft_adapter(adapter: Adapter, folder: Path, dtype: torch.dtype) -> None:
    """PEFT's own folder, which vLLM and SGLang read: one rank for all layers, scaling 1."""
    factors = adapter.padded()
    folder.mkdir()
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.to(dtype)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
        "base_model_name_or_path": None,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def write_mlx_adapter(adapter: Adapter, folder: Path, dtype: torch.dtype, *, n_layers: int) -> None:
    """``adapters.safetensors`` and ``adapter_config.json`` of mlx-lm, whose factors are transposed."""
    factors = adapter.padded()
    folder.mkdir()
    tensors = {}
    keys = set()
    for name, (A, B) in factors.items():
        tensors[f"{name}.lora_a"] = A.t().contiguous().to(dtype)
        tensors[f"{name}.lora_b"] = B.t().contiguous().to(dtype)
        found = _LAYER.fullmatch(name)
        keys.add(found[3] if found else name)
    save_file(tensors, folder / "adapters.safetensors", metadata={"format": "mlx"})
    parameters = {"rank": adapter.rank, "scale": 1.0, "dropout": 0.0, "keys": sorted(keys)}
    config = {"fine_tune_type": "lora", "num_layers": n_layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_gguf_adapter(adapter: Adapter, file: Path, base: Path, row_order: Mapping[str, tuple[str, Tensor]]) -> None:
    """llama.cpp's GGUF adapter. The rows of B follow those of the base, which llama.cpp's converter has moved.

    Args:
        adapter: what to write.
        file: where.
        base: the GGUF file of the model.
        row_order: of each tensor in ``base`` that is of one layer, that layer and its row in each place.

    Raises:
        NotImplementedError: a layer of the adapter is in no such tensor: it is dense, or joined with another one.
    """
    import gguf

    factors = adapter.padded()
    missing = factors.keys() - {layer for layer, _ in row_order.values()}
    if missing:
        raise NotImplementedError(
            f"the adapter has the layer {min(missing)}, which is not quantized, or joined with others in the GGUF "
            "file. Merge the adapter first (peft_quantlayers.merge_back). Nothing was written."
        )
    writer = gguf.GGUFWriter(file, gguf.GGUFReader(base).fields["general.architecture"].contents())
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(adapter.rank))
    for tensor_name, (layer, rows) in row_order.items():
        if layer in factors:
            A, B = factors[layer]
            writer.add_tensor(f"{tensor_name}.lora_a", A.half().numpy())
            writer.add_tensor(f"{tensor_name}.lora_b", B[rows].half().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def n_layers_of(config: Mapping[str, Any]) -> int:
    """Blocks of a language model, from its config."""
    text = config.get("text_config", config)
    return int(text.get("num_hidden_layers") or text.get("n_layer") or 0)
