"""Tiny random language models of the architectures that engines read, for exports: in tests and in their table."""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Name: config, model, and what its readers take for granted, whatever the config says. Gemma's look for 256 as the
# sizes of a head and of the scale of its queries; mlx-lm for a layer of each kind of its attention.
_FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"head_dim": 256, "num_hidden_layers": 6}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"original_max_position_embeddings": 128}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {}),
    "qwen3-moe": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM,
        {"head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}  # fmt: skip
FAMILIES = tuple(_FAMILIES)


def tiny_decoder(family: str, **sizes: Any) -> PreTrainedModel:
    """A model of random weights, the same at every call; ``sizes`` in the place of ``SIZES``."""
    config, model, own = _FAMILIES[family]
    torch.manual_seed(0)
    return model(config(**SIZES | own | sizes)).eval()
