"""Bytes of well-known models, as floats and quantized, from their public configs on the meta device.

No weight is loaded: a model is built without memory, and ``summary(model, config)`` says what the config would make
of it. "Experts dense" is what a quantizer of linear layers leaves, "prepared" what ``prepare_model_for_kbit_training``
makes of the model at 4 bits: what is dense, but for experts, in float32. Writes ``results/model_sizes.json``.
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import peft_quantlayers as pql

RESULTS = Path(__file__).parent / "results"
NBITS = (4, 3, 2)

GPT_OSS = {"hidden_size": 2880, "intermediate_size": 2880, "vocab_size": 201088, "num_attention_heads": 64}
# Of the numbers in each model's published config.json.
DENSE: dict[str, PreTrainedConfig] = {
    "Llama-3.2-1B": LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, tie_word_embeddings=True,
    ),
    "Qwen3-4B": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Gemma-3-12B, text": Gemma3TextConfig(
        hidden_size=3840, intermediate_size=15360, num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=8,
        head_dim=256, vocab_size=262208,
    ),
    "Qwen3-14B": Qwen3Config(
        hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "Mistral-Small-24B": MistralConfig(
        hidden_size=5120, intermediate_size=32768, num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=131072,
    ),
    "Qwen3-32B": Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64, num_key_value_heads=8,
        head_dim=128, vocab_size=151936,
    ),
    "Llama-3.3-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8,
        vocab_size=128256,
    ),
}  # fmt: skip
MIXTURES: dict[str, PreTrainedConfig] = {
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768, intermediate_size=6144, vocab_size=151936,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096, num_hidden_layers=94, num_attention_heads=64, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, moe_intermediate_size=1536, intermediate_size=12288, vocab_size=151936,
    ),
    "gpt-oss-20b": GptOssConfig(**GPT_OSS, num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": GptOssConfig(**GPT_OSS, num_hidden_layers=36, num_local_experts=128),
    "Mixtral-8x7B": MixtralConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        num_local_experts=8, vocab_size=32000,
    ),
    "DeepSeek-V3": DeepseekV3Config(),
    "GLM-4.5-Air": Glm4MoeConfig(
        hidden_size=4096, num_hidden_layers=46, num_attention_heads=96, num_key_value_heads=8, head_dim=128,
        moe_intermediate_size=1408, intermediate_size=10944, n_routed_experts=128, n_shared_experts=1,
        num_experts_per_tok=8, first_k_dense_replace=1, vocab_size=151552, attention_bias=True,
    ),
    "Llama 4 Scout, text": Llama4TextConfig(num_local_experts=16, interleave_moe_layer_step=1, vocab_size=202048),
}  # fmt: skip


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = pql.summary(model)
    found: dict[str, Any] = {"n_parameters": dense.n_parameters, "float": dense.nbytes}
    found["experts"] = sum(m.n_parameters for m in dense.modules if m.reason == "fused experts")
    if found["experts"]:
        left_dense = pql.HQQConfig(nbits=4, skip_modules=["experts"])
        found["experts_dense"] = pql.summary(model, left_dense).nbytes
    for nbits in NBITS:
        planned = pql.summary(model, pql.HQQConfig(nbits=nbits))
        found[f"hqq{nbits}"], found["fraction_quantized"] = planned.nbytes, planned.fraction_quantized
        if nbits == 4:
            upcast = (m.nbytes for m in planned.dense if m.reason != "fused experts")
            found["prepared"] = planned.nbytes + sum(upcast)
    return found


def main() -> None:
    sizes = {
        kind: {name: sizes_of(config) for name, config in configs.items()}
        for kind, configs in (("dense", DENSE), ("mixtures", MIXTURES))
    }
    result = {"command": "python benchmarks/model_sizes.py", **sizes}
    (RESULTS / "model_sizes.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, found in (sizes["dense"] | sizes["mixtures"]).items():
        print(name, {key: round(value / 1e9, 2) for key, value in found.items()})


if __name__ == "__main__":
    main()
