"""Tiny random models of the families that the tests load, quantize and save."""

from pathlib import Path

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainingArguments,
)

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128, bos_token_id=1, eos_token_id=2)
    ),
    "falcon": lambda: FalconForCausalLM(
        FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=128, bias=True)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=128)
    ),
}


def tiny_model(family: str = "llama") -> PreTrainedModel:
    """A model of random weights, the same at every call."""
    torch.manual_seed(0)
    return FAMILIES[family]().eval()


def saved_tiny_model(folder: Path, family: str = "llama") -> Path:
    """The folder of a saved :func:`tiny_model`."""
    tiny_model(family).save_pretrained(folder)
    return folder


def token_ids() -> torch.Tensor:
    """(2, 9) token ids."""
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


def training_arguments(folder: Path, *, steps: int, bf16: bool) -> TrainingArguments:
    """For a Trainer that takes ``steps`` steps of two rows on a CPU, and saves after the last."""
    return TrainingArguments(
        folder,
        per_device_train_batch_size=2,
        max_steps=steps,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        report_to="none",
        save_strategy="steps",
        save_steps=steps,
        bf16=bf16,
        use_cpu=True,
        disable_tqdm=True,
    )
