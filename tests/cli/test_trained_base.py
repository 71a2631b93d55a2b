"""``train`` on a float model leaves all that the other verbs need: the quantized base lies beside the adapter."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from commands import TEXT, printed, refused
from every_method import quick_config
from integrations.tiny import FAMILIES
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from tiny_folder import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.cli import main
from peft_quantlayers.cli.verbs import train
from peft_quantlayers.methods import registered_methods
from peft_quantlayers.streaming import quantize_files
from peft_quantlayers.streaming.checkpoint_parts import PartsOfModel

HQQ = ["--quantization.nbits", "4", "--quantization.group_size", "32"]
STEPS = ["--training.max_steps", "2", "--training.learning_rate", "0.01", "--training.save_strategy", "no"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("\n".join([json.dumps({"text": TEXT[:200]})] * 8))
    return str(file)


def float_folder(folder: Path, family: str) -> str:
    """A tiny model whose vocabulary is that of bytes."""
    torch.manual_seed(0)
    model, tokenizer = FAMILIES[family](), byte_tokenizer()
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def quick_options(method: str) -> list[str]:
    """The options that give the method's quick config."""
    quick = quick_config(method)
    default = type(quick)()
    options = {"method": method}
    for field in fields(quick):
        if getattr(quick, field.name) != getattr(default, field.name):
            options[field.name] = str(getattr(quick, field.name))
    return [part for name, value in options.items() for part in (f"--quantization.{name}", value)]


def trained(tmp_path, data, *, family="llama", quantization=HQQ, options=()) -> Path:
    source, out = float_folder(tmp_path / "float", family), tmp_path / "tuned"
    assert main(["train", source, str(out), "--data", data, *quantization, *STEPS, *options]) == 0
    return out


@pytest.mark.parametrize(
    ("family", "method"), [*(("llama", method) for method in registered_methods()), ("gpt2", "hqq")]
)
def test_what_was_trained_on_a_float_model_is_merged_measured_and_talked_with(family, method, tmp_path, data, capsys):
    out = trained(tmp_path, data, family=family, quantization=quick_options(method))
    shutil.rmtree(tmp_path / "float")  # nothing needs it any more
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    assert {layer.spec.method for layer in pql.quantized_modules(base).values()} == {method}
    # In Python too, and without a warning of another base.
    ids = torch.arange(1, 9)[None]
    tuned = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    assert not torch.equal(tuned(ids).logits, base.eval()(ids).logits)
    printed(capsys, ["merge", str(out), str(tmp_path / "merged")])
    assert pql.quantized_modules(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    held_out = ["--text", data, "--n_tokens", "128", "--window", "64", "--json"]
    found = json.loads(printed(capsys, ["evaluate", str(out), *held_out]))
    assert found["adapter"] == str(out)
    assert found["perplexity"] != json.loads(printed(capsys, ["evaluate", str(out / "base"), *held_out]))["perplexity"]
    said = printed(capsys, ["chat", str(out), "--prompt", "The lamp", "--max_new_tokens", "2", "--json"])
    assert json.loads(said)["messages"]


def test_it_is_exported_with_its_adapter(tmp_path, data, capsys):
    out = trained(tmp_path, data, options=["--quantization.symmetric", "true"])
    printed(capsys, ["export", str(out), str(tmp_path / "served"), "--format", "gptq"])
    assert list((tmp_path / "served").rglob("adapter_config.json"))


def test_the_folder_may_be_moved(tmp_path, data, capsys):
    out = trained(tmp_path, data)
    out.rename(tmp_path / "elsewhere")
    printed(capsys, ["merge", str(tmp_path / "elsewhere"), str(tmp_path / "merged")])
    shutil.rmtree(tmp_path / "elsewhere" / "base")
    said = refused(capsys, ["merge", str(tmp_path / "elsewhere"), str(tmp_path / "no")], 1)
    assert f"was trained on {out / 'base'}, which is not there. Name its base: --model FOLDER_OR_NAME" in said
    assert not (tmp_path / "no").exists()


def test_the_base_is_that_of_quantize_and_is_kept_where_it_is_told(tmp_path, data, capsys):
    shared = tmp_path / "shared"
    out = trained(tmp_path, data, options=["--base_output", str(shared)])
    assert not (out / "base").exists()
    quantized = tmp_path / "quantized"
    printed(capsys, ["quantize", str(tmp_path / "float"), str(quantized), "--nbits", "4", "--group_size", "32"])
    one, two = (load_file(folder / "model.safetensors") for folder in (shared, quantized))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    # A second adapter on the same model takes the base that is there.
    before = (shared / "model.safetensors").stat().st_mtime_ns
    command = ["train", str(tmp_path / "float"), str(tmp_path / "second"), "--data", data, *STEPS]
    printed(capsys, [*command, *HQQ, "--base_output", str(shared)])
    assert (shared / "model.safetensors").stat().st_mtime_ns == before
    printed(capsys, ["merge", str(tmp_path / "second"), str(tmp_path / "merged")])
    said = refused(capsys, [*command[:2], str(tmp_path / "third"), *command[3:], "--base_output", str(shared)], 1)
    assert "holds another model, or the same one quantized in another way" in said
    assert not (tmp_path / "third").exists()


def test_a_dry_run_says_what_the_base_and_the_rest_take_on_disk(tmp_path, data, capsys):
    source, out = float_folder(tmp_path / "float", "llama"), tmp_path / "tuned"
    command = ["train", source, str(out), "--data", data, *HQQ, *STEPS, "--merge", "auto"]
    text = printed(capsys, [*command, "--dry_run"])
    assert f"quantized base in {out / 'base'}" in text
    told = json.loads(printed(capsys, [*command, "--dry_run", "--json"]))
    assert not out.exists()
    printed(capsys, command)
    sizes = {
        "quantized base": (out / "base" / "model.safetensors").stat().st_size,
        "adapter": (out / "adapter_model.safetensors").stat().st_size,
        "merged model": (out / "merged" / "model.safetensors").stat().st_size,
    }
    assert told["disk"].keys() - {"a checkpoint"} == sizes.keys()
    for name, size in sizes.items():
        assert told["disk"][name] == pytest.approx(size, rel=0.25), name  # tiny files are headers to a good part
    # What is quantized already needs no base of its own.
    again = ["train", str(out / "base"), str(tmp_path / "second"), "--data", data, "--dry_run", "--json"]
    assert json.loads(printed(capsys, again))["disk"].keys() == {"adapter", "a checkpoint"}
    for option in (["--quantization.nbits", "3"], ["--base_output", str(tmp_path / "other")]):
        assert f"quantized already, and {option[0]} is for a float model" in refused(capsys, [*again, *option], 1)


def test_interrupted_while_it_is_quantized_it_goes_on_there(tmp_path, data, capsys, monkeypatch):
    source, out = float_folder(tmp_path / "float", "llama"), tmp_path / "tuned"
    command = ["train", source, str(out), "--data", data, *HQQ, *STEPS]
    keep = PartsOfModel.keep

    def interrupted(self, work, number):
        if number == at:
            raise KeyboardInterrupt
        keep(self, work, number)

    monkeypatch.setattr(quantize_files, "PART_BYTES", 2**14)
    for at in (0, 1):
        monkeypatch.setattr(PartsOfModel, "keep", interrupted)
        assert "interrupted" in refused(capsys, command, 130)
        assert out.exists() == (at > 0)  # nothing was finished, so nothing is kept
    monkeypatch.setattr(PartsOfModel, "keep", keep)
    assert "--training.resume_from_checkpoint true" in refused(capsys, command, 1)
    printed(capsys, [*command, "--training.resume_from_checkpoint", "true"])
    assert (out / "adapter_model.safetensors").is_file()


def test_what_cannot_be_trained_is_refused_before_the_base_is_written(tmp_path, data, capsys, monkeypatch):
    source, out = float_folder(tmp_path / "float", "llama"), tmp_path / "tuned"
    monkeypatch.setattr(train, "load_model", None)
    command = ["train", source, str(out), "--data", data, *HQQ, *STEPS]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for options, said, code in (
        (["--lora.target_modules", "no_such_layer"], "no_such_layer", 1),
        (["--quantization.nbits", "9"], "nbits", 2),
        (["--base_output", str(tmp_path / "full")], "full is not empty", 1),
        (["--base_output", source], "is read, and would be replaced", 1),
    ):
        assert said in refused(capsys, [*command, *options], code)
        assert not out.exists(), options
    shutil.copytree(source, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    assert "safetensors" in refused(capsys, [*command[:1], str(tmp_path / "pickled"), *command[2:]], 1)
    assert not out.exists()


def test_the_tokenizer_of_the_adapter_is_the_one_that_it_was_trained_with(tmp_path, data, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = trained(tmp_path, data, options=["--tokenizer", str(tmp_path / "tokenizer")])
    printed(capsys, ["merge", str(out), str(tmp_path / "merged")])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template
