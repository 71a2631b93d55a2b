"""Quantized models without numbers: on the meta device, or one block of one, with random numbers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..formats import QuantSpec
from ..layers.embedding_tables import place_empty_table, place_empty_tables
from ..layers.quantized_layers import layers_without_copies, quantized_layers
from ..layers.replace import place_empty_layer
from ..layers.selection import quantizable_modules, quantizable_tables
from ..methods import QuantConfig


def quantized_on_meta(model: PreTrainedModel, config: QuantConfig | None) -> dict[str, QuantSpec]:
    """Put empty quantized layers into ``model``, which is on the meta device; the spec of each.

    A model that is quantized already stays as it is, and needs no ``config``.
    """
    layers = layers_without_copies(model)
    if layers:
        return {name: layer.spec for name, layer in layers.items()}
    if config is None:
        raise ValueError("the model is a float model: say how it will be quantized (--method, --nbits, ...).")
    specs = quantizable_modules(model, config)
    planned = quantizable_tables(model, config)
    for name, spec in specs.items():
        place_empty_layer(model, name, spec, compute_dtype=config.compute_dtype, device="meta")
    for table, spec in planned.values():
        place_empty_table(model, table, spec, compute_dtypes=dict.fromkeys(table.names, config.compute_dtype))
    return specs | {name: spec for name, (_, spec) in planned.items()}


def one_block_model(model: PreTrainedModel, config: QuantConfig | None) -> PreTrainedModel | None:
    """A model like ``model`` with one block and a small vocabulary, in memory with random numbers.

    None where the config does not say how many blocks there are, or has several kinds.
    """
    described = copy.deepcopy(model.config)
    text = described.get_text_config()
    if described.is_encoder_decoder or text is not described or not hasattr(text, "num_hidden_layers"):
        return None
    if len(set(getattr(text, "layer_types", None) or [])) > 1:
        return None
    text.num_hidden_layers, text.vocab_size = 1, min(256, text.vocab_size)
    text.pad_token_id = text.bos_token_id = text.eos_token_id = None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    if hasattr(described, "quantization_config"):
        del described.quantization_config
    with torch.device("meta"):
        block: Any = type(model)(described)
    block.to(model.dtype)
    if config is None:
        specs = {name: layer.spec for name, layer in quantized_layers(model).items()}
        tables = place_empty_tables(block, specs, compute_dtypes={}, device="meta")
        for name, layer in quantized_layers(model).items():
            if _has(block, name) and name not in tables:
                place_empty_layer(block, name, layer.spec, compute_dtype=None, device="meta")
    else:
        quantized_on_meta(block, config)
    return _with_random_numbers(block)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _with_random_numbers(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` in memory. Numbers that are left as memory has them may be so small that they are slow."""
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
        else:
            tensor.data.random_(0, 16)
    return model
