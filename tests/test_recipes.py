"""Every recipe of ``examples/recipes`` runs, on tiny models under the names that it gives or in its place."""

import json
import re
import runpy
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from hub import put_in_hub, tiny_hub
from tiny_folder import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import peft_quantlayers as pql
from peft_quantlayers.cli import main

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
MAX_LINES = 60


@pytest.fixture
def recipes(tmp_path, monkeypatch) -> Path:
    """A copy of the folder, in which a test runs."""
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tiny_hub(tmp_path / "hub")))
    return folder


def run_python(name: str, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", [name, *map(str, arguments)])
    runpy.run_path(name, run_name="__main__")


def test_chats(recipes):
    assert main(["train", "chat.yaml", "--training.num_train_epochs", "1"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("chat-merged")
    assert len(list(pql.quantized_modules(merged))) == 14


def test_preferences(recipes):
    assert main(["train", "preferences.yaml", "--training.num_train_epochs", "1"]) == 0
    assert (recipes / "preferences-adapter" / "adapter_model.safetensors").exists()


def test_what_is_trained_is_what_is_served(recipes, capsys):
    assert main(["train", "serve_exactly.yaml", "--training.num_train_epochs", "1"]) == 0
    assert main(["export", "served-merged", "served", "--format", "mlx", "--json"]) == 0
    report = json.loads((recipes / "served" / "export_report.json").read_text())
    assert report["is_exact"]


def test_two_bits_and_tuned_scales(recipes):
    assert main(["quantize", "two_bits.yaml"]) == 0
    tuning = ["--adapter_type", "scales", "--scales.train", "[scales,codebooks]", "--data", "data/chats.jsonl"]
    assert main(["train", "two-bits", *tuning, "--output", "two-bits-tuned", "--training.max_steps", "1"]) == 0
    assert (recipes / "two-bits-tuned" / "adapter_model.safetensors").exists()


def test_larger_than_memory(recipes, capsys):
    assert main(["quantize", "larger_than_memory.yaml", "--dry_run"]) == 0
    assert not (recipes / "streamed").exists()
    assert main(["quantize", "larger_than_memory.yaml"]) == 0
    assert pql.verify_model("streamed") == []


def test_encoder(recipes, tmp_path, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    BertModel(BertConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    put_in_hub(
        Path(huggingface_hub.constants.HF_HUB_CACHE), tmp_path / "bert", "sentence-transformers/all-MiniLM-L6-v2"
    )
    run_python("encoder.py", monkeypatch)
    assert int(re.search(r"right after the merge: (\d+)%", capsys.readouterr().out).group(1)) > 60


def test_vision_language(recipes, tmp_path, monkeypatch, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="full")
    processor.num_additional_image_tokens = 1
    processor.save_pretrained(tmp_path / "llava")
    text = LlamaConfig(**SIZES, vocab_size=len(tokenizer))
    vision = CLIPVisionConfig(**SIZES, image_size=28, patch_size=14)
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=image_token, vision_feature_select_strategy="full"
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "llava")
    run_python("vision_language.py", monkeypatch, tmp_path / "llava")
    output = capsys.readouterr().out
    losses = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert pql.verify_model("vision-merged") == []


def test_mixture(recipes, monkeypatch, capsys):
    run_python("mixture.py", monkeypatch)
    assert "step 2: loss" in capsys.readouterr().out
    assert pql.quantized_stacks(AutoModelForCausalLM.from_pretrained("mixture-merged"))


def test_the_notebook(recipes, monkeypatch):
    cells = json.loads((recipes / "quickstart.ipynb").read_text())["cells"]
    assert all(not cell.get("outputs") for cell in cells)
    names: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("max_steps=15", "max_steps=2"), names)
    assert (recipes / "served").is_dir()


def test_recipes_are_short_and_listed():
    files = [file for file in RECIPES.iterdir() if file.suffix in (".py", ".yaml")]
    assert {file.name for file in files if len(file.read_text().splitlines()) > MAX_LINES} == set()
    listed = (RECIPES / "README.md").read_text()
    assert [file.name for file in files if f"`{file.name}`" not in listed] == []
