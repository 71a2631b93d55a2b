"""Tiny models quantized by the ``hqq`` package, and the folders in which they were published."""

import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


def float_model(*, hidden_size: int = 64, dtype: torch.dtype = torch.float32, is_tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=97,
        max_position_embeddings=64,
        tie_word_embeddings=is_tied,
        attention_bias=True,
        dtype=dtype,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter.data, std=0.02)
    return model


@cache
def package_model(
    nbits: float = 4,
    axis: int = 1,
    *,
    dtype: torch.dtype = torch.float32,
    hidden_size: int = 64,
    is_tied: bool = False,
    view_as_float: bool = False,
) -> nn.Module:
    """A Llama of two blocks with all but its head quantized by the package, groups of 64. Shared: change nothing."""
    model = float_model(hidden_size=hidden_size, dtype=dtype, is_tied=is_tied)
    settings = BaseQuantizeConfig(nbits=nbits, group_size=64, axis=axis, view_as_float=view_as_float)
    with patch("hqq.models.base.cleanup"):  # three garbage collections, nine tenths of the time
        AutoHQQHFModel.quantize_model(model, settings, compute_dtype=dtype, device="cpu")
    return model


def package_layers(model: nn.Module) -> dict[str, HQQLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HQQLinear)}


def package_codes(layer: HQQLinear) -> Tensor:
    """(out_features, in_features), uint8."""
    W_q, meta = layer.W_q.data, layer.meta
    if meta["view_as_float"]:
        W_q = W_q.view(meta["unpack_view_dtype"])
    rows = meta["scale"].shape[0] if meta["axis"] == 1 else meta["group_size"]
    return Quantizer.unpack[meta["packing"]](W_q)[:rows].reshape(meta["shape"])


def safetensors_entries(model: nn.Module) -> dict[str, Tensor]:
    """The flat entries as transformers 4 wrote them: HQQLinear's own state_dict beside everybody else's."""
    entries = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del entries["lm_head.weight"]
    return entries


def save_like_transformers_4(
    model: nn.Module, folder: Path, *, entries: dict[str, Tensor] | None = None, n_files: int = 1
) -> Path:
    """config.json and safetensors, in ``n_files`` files with an index where there is more than one."""
    folder.mkdir()
    entries = safetensors_entries(model) if entries is None else entries
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    config: dict[str, Any] = model.config.to_diff_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "dtype": dtype,
        "quantization_config": {
            "quant_config": BaseQuantizeConfig(nbits=4, group_size=64, axis=1),
            "quant_method": "hqq",
            "skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    if n_files == 1:
        save_file(entries, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    # Dealt out one by one, so that the tensors of a layer lie in different files.
    weight_map = {}
    for part in range(n_files):
        file = f"model-{part + 1:05}-of-{n_files:05}.safetensors"
        names = list(entries)[part::n_files]
        save_file({name: entries[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in entries.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_like_the_package(model: nn.Module, folder: Path) -> Path:
    """config.json and qmodel.pt."""
    folder.mkdir()
    AutoHQQHFModel.save_quantized(model, str(folder))
    for layer in package_layers(model).values():
        layer.encoded_state_dict = True  # save_quantized leaves it off
    return folder
