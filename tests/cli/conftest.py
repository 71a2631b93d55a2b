"""A tiny model, what quantize makes of it, an adapter on that, and a text: made once for all tests of verbs."""

import json

import pytest
import torch
from commands import TEXT
from peft import LoraConfig, get_peft_model
from tiny_folder import byte_tokenizer, save_tiny_llama
from transformers import AutoModelForCausalLM

from peft_quantlayers.cli import main


@pytest.fixture(scope="session")
def float_model(tmp_path_factory) -> str:
    return str(save_tiny_llama(tmp_path_factory.mktemp("float"), byte_tokenizer()))


@pytest.fixture(scope="session")
def quantized(float_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("quantized") / "model"
    assert main(["quantize", float_model, str(folder), "--group_size", "32"]) == 0
    return str(folder)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="session")
def adapter(quantized, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("adapter") / "lora"
    model = AutoModelForCausalLM.from_pretrained(quantized)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def commands(float_model, quantized, adapter, text_file, tmp_path) -> dict[str, list[str]]:
    """A command for each verb that would be done; what it writes is ``tmp_path / "out"``."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([json.dumps({"text": TEXT[:200]})] * 8))
    out = str(tmp_path / "out")
    steps = ["--training.max_steps", "2", "--training.save_steps", "1"]
    return {
        "quantize": ["quantize", float_model, out, "--group_size", "32"],
        "train": ["train", quantized, out, "--data", str(rows), *steps],
        "merge": ["merge", adapter, out],
        "export": ["export", quantized, out, "--format", "mlx"],
        "evaluate": ["evaluate", quantized, "--text", text_file, "--n_tokens", "256", "--window", "64"],
        "inspect": ["inspect", quantized],
        "estimate": ["estimate", quantized],
        "report": ["report", quantized, out, "--n_worst", "0"],
        "chat": ["chat", quantized, "--prompt", "x", "--max_new_tokens", "2"],
    }
