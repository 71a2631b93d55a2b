"""A tiny model, what quantize makes of it, an adapter on that, and a text: made once for all tests of verbs."""

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
