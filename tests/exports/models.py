"""Quantized tiny models of several architectures, on grids that exports hold."""

from pathlib import Path

import torch
from _tiny_decoders import tiny_decoder
from integrations.tiny import tiny_model
from transformers import PreTrainedModel

import peft_quantlayers as pql

GROUP = 32
LAYER = "model.layers.1.mlp.down_proj"


def quantized(family: str = "llama", *, config=None, dtype=torch.float32, **fields) -> PreTrainedModel:
    model = tiny_model(family).to(dtype)
    for name, parameter in model.named_parameters():  # biases and norms that are not all alike
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, mean=float("norm" in name or "ln" in name), std=0.05)
    return pql.quantize_model(model, config or pql.HQQConfig(**({"group_size": GROUP} | fields)), progress=False)


def readable(family: str = "llama", *, config=None, sizes=None, **fields) -> PreTrainedModel:
    """A model of the sizes that engines' readers and their tokenizers take, quantized."""
    model = tiny_decoder(family, **(sizes or {}))
    return pql.quantize_model(model, config or pql.HQQConfig(**({"group_size": GROUP} | fields)), progress=False)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: layer.dequantize(torch.float32) for name, layer in pql.quantized_modules(model).items()}


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
