"""Tiny mixtures of experts of every family, for tests; of random weights, the same at every call."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    JetMoeConfig,
    JetMoeForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongcatFlashConfig,
    LongcatFlashForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from peft_quantlayers.layers.quantized_layers import quantized_stacks

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 128,
}
HEADS = {"head_dim": 16}
MLA = {
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip

MIXTURES = {
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32)
    ),
    "olmoe": lambda: OlmoeForCausalLM(
        OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, intermediate_size=32)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4}, **MLA, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, moe_intermediate_size=32, intermediate_size=64, n_shared_experts=1, first_k_dense_replace=1,
        )
    ),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(
            **SIZES, **HEADS, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            moe_intermediate_size=32, intermediate_size=64, n_shared_experts=1, first_k_dense_replace=1,
        )
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(**SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32)
    ),
    "llama4": lambda: Llama4ForCausalLM(
        Llama4TextConfig(
            **SIZES, **HEADS, num_local_experts=4, num_experts_per_tok=1, intermediate_size=32,
            intermediate_size_mlp=64, interleave_moe_layer_step=1,
        )
    ),
    "granitemoe": lambda: GraniteMoeForCausalLM(
        GraniteMoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32)
    ),
    "longcat_flash": lambda: LongcatFlashForCausalLM(
        LongcatFlashConfig(
            **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"} | {"num_key_value_heads": 4}, **MLA,
            num_layers=2, head_dim=8, ffn_hidden_size=64, n_routed_experts=4, zero_expert_num=2, moe_topk=2,
            expert_ffn_hidden_size=32,
        )
    ),
    "jetmoe": lambda: JetMoeForCausalLM(
        JetMoeConfig(
            **{k: v for k, v in SIZES.items() if k != "num_attention_heads"}, kv_channels=16, num_local_experts=4,
            num_experts_per_tok=2, intermediate_size=32,
        )
    ),
    "nemotron_h": lambda: NemotronHForCausalLM(
        NemotronHConfig(
            **{k: v for k, v in SIZES.items() if k != "num_hidden_layers"}, **HEADS,
            layers_block_type=["moe", "attention", "moe"], n_routed_experts=4, num_experts_per_tok=2, n_group=1,
            topk_group=1, moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, n_shared_experts=1,
            intermediate_size=64, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=16,
        )
    ),
}  # fmt: skip


def tiny_mixture(family: str, dtype: torch.dtype = torch.float32, **changed: Any) -> PreTrainedModel:
    """A model of the family, in evaluation mode; its biases and routers are no longer zeros. ``changed`` are fields of
    the config."""
    torch.manual_seed(0)
    model = MIXTURES[family]().eval()
    if changed:
        model = type(model)(type(model.config)(**model.config.to_diff_dict() | changed)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # rotary tables stay as they are computed
            if not parameter.any():
                parameter.normal_(std=0.05)
            elif parameter.dim() == 3:
                parameter.mul_(5)  # such that experts matter
    return model


def codes(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the tensors of all stacks, by name."""
    return {
        f"{name}.{part}": tensor.clone()
        for name, stack in quantized_stacks(model).items()
        for part, tensor in stack.quantized_weight.tensors.items()
    }


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
