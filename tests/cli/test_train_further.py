"""``train --adapter``: an adapter that is there is trained further, as it is, on its own base."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import TEXT, printed
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_train import PAIRS, with_settings
from test_wrong_places import refused_untouched
from transformers import AutoModelForCausalLM

from peft_quantlayers.cli import main
from peft_quantlayers.cli.trained_adapter import checked_reference

ROWS = [{"text": TEXT[:200]}] * 8
KINDS = {
    "lora": {},
    "qalora": {"lora": {"r": 4, "lora_alpha": 8, "use_qalora": True, "qalora_group_size": 32}},
    "merge aware": {"merge_aware": True},
    "scales": {"adapter_type": "scales"},
}
STEPS = {"max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no", "logging_steps": 1}


def first_adapter(tmp_path: Path, model: str, kind: str) -> Path:
    """An adapter that changes what the model predicts."""
    folder = tmp_path / "first"
    command = with_settings(tmp_path, ROWS, model=model, training=STEPS, **KINDS[kind])
    assert main([*command, "--output", str(folder)]) == 0
    return folder


def further(tmp_path: Path, *options: str, rows=ROWS, **training) -> list[str]:
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [part for name, value in {**STEPS, **training}.items() for part in (f"--training.{name}", str(value))]
    return ["train", "--output", str(tmp_path / "again"), "--data", str(tmp_path / "more.jsonl"), *given, *options]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_it_starts_as_it_was_and_stays_of_its_kind(kind, quantized, tmp_path, capsys):
    first = first_adapter(tmp_path, quantized, kind)
    printed(capsys, further(tmp_path, "--adapter", str(first), learning_rate=0.0))
    kept, before = weights(tmp_path / "again"), weights(first)
    assert kept.keys() == before.keys()
    assert all(kept[name].equal(before[name]) for name in before)
    configs = [json.loads((each / "adapter_config.json").read_text()) for each in (first, tmp_path / "again")]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    shutil.rmtree(tmp_path / "again")
    # As an adapter in the place of a model, it stands for its base and itself, as in the other verbs.
    command = further(tmp_path, "--model", str(first), "--merge", "auto")
    printed(capsys, command)
    changed = weights(tmp_path / "again")
    assert all(not changed[name].equal(before[name]) for name in before if "lora_A" not in name)
    base = first / "quantlayers_base.json"
    if base.exists():
        assert base.read_text() == (tmp_path / "again" / "quantlayers_base.json").read_text()
    settings = yaml.safe_load((tmp_path / "again" / "train.yaml").read_text())
    assert (settings["model"], settings["adapter"]) == (quantized, str(first))
    report = json.loads((tmp_path / "again" / "merged" / "merge_report.json").read_text())
    strategies = {"lora": "requantize", "merge aware": "aware"}
    assert {layer["strategy"] for layer in report["layers"]} == {strategies.get(kind, "exact")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_of_dpo_is_the_adapter_as_it_was(kind, quantized, tmp_path, capsys):
    first = first_adapter(tmp_path, quantized, kind)
    # Far from the base, so that the base as a reference would show in the first loss.
    large = {name: tensor * (8 if "lora_B" in name else 1) for name, tensor in weights(first).items()}
    save_file(large, first / "adapter_model.safetensors", metadata={"format": "pt"})
    command = further(tmp_path, "--trainer", "dpo", rows=PAIRS, max_steps=6, save_strategy="steps", save_steps=3)
    printed(capsys, [*command, "--adapter", str(first)])
    again = tmp_path / "again"
    log = [each for each in json.loads((again / "trainer_state.json").read_text())["log_history"] if "loss" in each]
    assert log[0]["loss"] == pytest.approx(0.6931, abs=1e-3)  # nothing has changed yet: log 2
    assert log[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-3)
    assert log[-1]["loss"] < 0.69
    # The reference is not saved beside it, and is that of the start after an interruption too.
    assert not (again / "ref").exists()
    reference = load_file(again / "checkpoint-6" / "ref" / "adapter_model.safetensors")
    assert reference.keys() == large.keys()
    assert all(reference[name].equal(large[name]) for name in large)
    expected = weights(again)
    shutil.rmtree(again / "checkpoint-6")
    printed(capsys, [*command, "--adapter", str(first), "--training.resume_from_checkpoint", "true"])
    assert all(tensor.equal(expected[name]) for name, tensor in weights(again).items())


def test_a_reference_that_is_no_copy_of_it_is_refused(quantized, adapter):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(quantized), adapter)
    with pytest.raises(ValueError, match="make no copy of an adapter, to which --trainer dpo would compare it"):
        checked_reference(SimpleNamespace(model=model))
    model.add_adapter("ref", model.peft_config["default"])
    with pytest.raises(ValueError, match="make no copy"):
        checked_reference(SimpleNamespace(model=model))
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter)
    checked_reference(SimpleNamespace(model=model))


@pytest.mark.parametrize("name", ["adapter_name_or_path", "lora_model_dir"])
def test_names_of_other_trainers_in_a_file(name, quantized, tmp_path, capsys):
    first = first_adapter(tmp_path, quantized, "lora")
    (tmp_path / "further.yaml").write_text(yaml.safe_dump({name: str(first), "lora_r": 4, "num_epochs": 1}))
    command = further(tmp_path)
    printed(capsys, ["train", str(tmp_path / "further.yaml"), *command[1:]])
    before = weights(first)
    assert not all(tensor.equal(before[name]) for name, tensor in weights(tmp_path / "again").items())
    (tmp_path / "further.yaml").write_text(yaml.safe_dump({name: str(first), "lora_r": 8}))
    shutil.rmtree(tmp_path / "again")
    said = refused_untouched(capsys, ["train", str(tmp_path / "further.yaml"), *command[1:]], tmp_path, 2)
    assert f"--lora.r 8: the adapter in {first} has 4, and keeps it" in said  # 8 is PEFT's default


def test_the_settings_of_the_first_run_serve_the_second(quantized, tmp_path, capsys):
    first = first_adapter(tmp_path, quantized, "lora")
    command = further(tmp_path, "--adapter", str(first))
    printed(capsys, ["train", str(first / "train.yaml"), *command[1:]])
    again = tmp_path / "again"
    second = [part.replace(str(again), str(tmp_path / "third")) for part in command[1:]]
    printed(capsys, ["train", str(again / "train.yaml"), *second])
    assert all(tensor.equal(weights(again)[name]) for name, tensor in weights(tmp_path / "third").items())


def test_a_base_that_lies_in_the_adapter_is_found_also_where_both_were_moved(float_model, tmp_path, capsys):
    command = with_settings(tmp_path, ROWS, model=float_model, training=STEPS, quantization={"group_size": 32})
    printed(capsys, [*command, "--output", str(tmp_path / "first")])
    moved = tmp_path / "moved"
    (tmp_path / "first").rename(moved)
    printed(capsys, further(tmp_path, "--adapter", str(moved)))
    base = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(moved / "base")
    assert not (tmp_path / "again" / "base").exists()
    printed(capsys, ["merge", str(tmp_path / "again"), str(tmp_path / "merged")])


def test_what_contradicts_the_adapter_is_refused(quantized, float_model, adapter, tmp_path, capsys):
    other = str(tmp_path / "other")
    printed(capsys, ["quantize", float_model, other, "--group_size", "16"])
    model = AutoModelForCausalLM.from_pretrained(quantized)
    narrow = str(tmp_path / "narrow")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(narrow)
    for options, said, code in (
        (["--lora.r", "8"], "--lora.r 8: the adapter in", 2),
        (["--lora.lora_dropout", "0.1"], "has 0.0, and keeps it. Leave the option out", 2),
        (["--lora.target_modules", "[q_proj]"], "--lora.target_modules [q_proj]: the adapter in", 2),
        (["--lora.use_dora", "true"], "has false, and keeps it", 2),
        (["--scales.train", "[scales]"], "--scales.train is for --adapter_type scales", 2),
        (["--adapter_type", "scales"], f"--adapter_type scales: {adapter} is LoRA", 2),
        (["--adapter_type", "pv"], "trains the model itself. Leave out --adapter, or merge it first", 2),
        (["--model", other], "was trained on the quantized base", 1),
        (["--model", float_model], f"{float_model} is a float one", 1),
        (["--output", adapter, "--overwrite"], "is read, and would be replaced", 1),
        (["--quantization.nbits", "3"], "is quantized already", 1),
    ):
        assert said in refused_untouched(capsys, [*further(tmp_path, "--adapter", adapter), *options], tmp_path, code)
    said = refused_untouched(
        capsys, further(tmp_path, "--adapter", narrow, "--lora.target_modules", "all-linear"), tmp_path
    )
    assert "--lora.target_modules all-linear: the adapter in" in said
    for given, said, code in (
        ("qlora", "the folder of an adapter to train further is meant", 2),
        ("no/such/folder", "--adapter no/such/folder: there is no such folder", 1),
        (quantized, "Give the folder of an adapter", 1),
    ):
        assert said in refused_untouched(capsys, further(tmp_path, "--adapter", given), tmp_path, code)
    assert "name a model, or an adapter" in refused_untouched(capsys, further(tmp_path), tmp_path, 2)


def test_a_batch_and_a_plan_of_it_are_shown(quantized, adapter, tmp_path, capsys):
    assert "learned: [" in printed(capsys, further(tmp_path, "--adapter", adapter, "--show_batch"))
    assert "on disk:" in printed(capsys, further(tmp_path, "--adapter", adapter, "--dry_run"))
    assert not (tmp_path / "again").exists()


def test_an_error_of_the_trainer_names_what_was_given_and_not_what_the_adapter_brings(quantized, tmp_path, capsys):
    first = first_adapter(tmp_path, quantized, "lora")
    command = further(tmp_path, "--adapter", str(first), lr_scheduler_kwargs='{"x": 1}')
    text = refused_untouched(capsys, command, tmp_path, 2)
    assert "--training.max_steps 2" in text
    assert "--lora." not in text
