"""``train --adapter_type pv``: an AQLM model is trained as a whole, saved as a model, and gone on with."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import TEXT, printed, refused
from safetensors.torch import load_file
from test_wrong_places import refused_untouched
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql

ROWS = [{"prompt": f"{number} and one is", "completion": f" {number + 1}."} for number in range(10, 42)]


def settings_file(folder: Path, model: str) -> str:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    settings = {
        "model": model,
        "data": str(folder / "rows.jsonl"),
        "adapter_type": "pv",
        "quantization": {"method": "aqlm", "num_codebooks": 1, "nbits_per_codebook": 6, "rounds": 1},
        "pv": {"code_lr": 0.5, "trust_ratio": 0.1},
        "training": {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 8, "logging_steps": 1},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "train.yaml")


def test_codes_are_trained_saved_as_a_model_and_gone_on_with(float_model, tmp_path, capsys):
    file, out = settings_file(tmp_path, float_model), tmp_path / "out"
    assert "would train" in printed(capsys, ["train", file, "--output", str(out), "--dry_run"])
    assert f"the model is in {out}" in printed(capsys, ["train", file, "--output", str(out)])
    before, after = (load_file(folder / "model.safetensors") for folder in (out / "base", out))
    for name in ("codes", "codebooks", "scales"):
        changed = [key for key in after if key.endswith(name) and not torch.equal(after[key], before[key])]
        assert len(changed) >= 10, name
    saved = yaml.safe_load((out / "train.yaml").read_text())
    assert saved["training"]["learning_rate"] == 3e-4  # PVTuner's
    assert saved["training"]["adam_beta2"] == 0.95
    log = [row["loss"] for row in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in row]
    assert log[-1] < log[0]
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert len(pql.quantized_modules(loaded)) == 14
    assert not (out / "adapter_config.json").exists()
    assert "checksums: every tensor is as it was saved" in printed(capsys, ["inspect", str(out)])
    printed(capsys, ["report", str(out), "--n_worst", "0"])
    # From a checkpoint in the middle the same tensors, in another process of the same command.
    again = tmp_path / "again"
    shutil.copytree(out, again)
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(again / name)
    (again / "model.safetensors").unlink()
    resumed = ["train", file, "--output", str(again), "--training.resume_from_checkpoint", "true"]
    assert "trained 6 steps" in printed(capsys, resumed)
    found = load_file(again / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in after.items())
    assert "all 6 steps had been trained" in printed(capsys, resumed)
    assert "holds a model" in refused(capsys, [*resumed, "--adapter_type", "lora"], 1)


WRONG = [
    ("--merge auto", "there is no adapter, and --output is the trained model"),
    ("--trainer dpo", "--trainer dpo compares it with what it was"),
    ("--fsdp_size 2", "in one process"),
    ("--training.optim sgd", "Leave out --training.optim"),
    ("--training.weight_decay 0.1", "Leave out --training.weight_decay"),
    ("--quantization.method hqq", "--quantization.method aqlm"),
    ("--adapter_type lora --pv.code_lr 1", "--pv.code_lr is for --adapter_type pv"),
    ("--pv.code_lr -1", "--pv.code_lr: code_lr=-1.0 must lie above 0"),
    ("--pv.max_code_change 2", "--pv.max_code_change: max_code_change=2.0 must lie above 0.0 and not above 1.0"),
    ("--pv.trust_ratio 0", "--pv.trust_ratio: trust_ratio=0.0 must lie above 0"),
    ("--pv.buffer_bytes -1", "--pv.buffer_bytes: buffer_bytes=-1 must lie between 0"),
    ("--pv.buffer_bytes 9", "the gradient of its weight takes 32768 bytes and buffer_bytes=9 allows less"),
    ("--training.adam_beta1 1", "--training.adam_beta1, --training.adam_beta2: betas"),
    ("--lora.r 4", "--lora.r is for --adapter_type lora, and it is pv"),
    ("--merge_aware true", "leave it out, or --adapter_type pv"),
]


@pytest.mark.parametrize(("options", "said"), WRONG, ids=[options for options, _ in WRONG])
def test_what_pv_tuning_cannot_do_is_refused_before_anything_is_written(options, said, float_model, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT[:100]}))
    start = ["train", float_model, str(tmp_path / "out"), "--data", str(tmp_path / "rows.jsonl"), "--adapter_type"]
    method = ["--quantization.method", "aqlm"]
    assert said in refused_untouched(capsys, [*start, "pv", *method, *options.split()], tmp_path, 2)


def test_a_model_without_codes_to_move_is_refused_and_several_processes_are(quantized, tmp_path, capsys, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": TEXT[:100]}))
    command = ["train", quantized, str(tmp_path / "out"), "--data", str(tmp_path / "rows.jsonl")]
    command += ["--adapter_type", "pv"]
    assert f"{quantized} has none. Quantize its float model so" in refused_untouched(capsys, command, tmp_path)
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    monkeypatch.setattr("peft_quantlayers.cli.verbs.train.PartialState", lambda **_: two)
    assert "in one process" in refused_untouched(capsys, command, tmp_path, 2)
