"""``train`` in the two processes that ``accelerate launch`` starts gives what one process gives."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from processes import needs_gloo
from safetensors.torch import load_file

from peft_quantlayers.cli import main

ROOT = Path(__file__).parents[2]
FILES = {"copies": "accelerate_two_processes.yaml", "shards": "accelerate_fsdp2.yaml"}
ROWS = [{"prompt": f"{number} and one is", "completion": f" {number + 1}."} for number in range(10, 26)]
END = ("--merge", "calibrated", "--evaluate", "true", "--evaluate_options.window", "32", "--export", "mlx")
WAYS = {
    "ddp": ["-m", "peft_quantlayers", "train", *END],
    "ddp, by run": ["-m", "peft_quantlayers", "run", "-m", "peft_quantlayers", "train"],
    "fsdp2": ["-m", "peft_quantlayers", "train", "--fsdp_size", "2"],
    "ddp, float model": ["-m", "peft_quantlayers", "train"],
    "fsdp2, float model": ["-m", "peft_quantlayers", "train", "--fsdp_size", "2"],
    "fsdp2 of accelerate": [Path(__file__).with_name("as_on_gpus.py"), "train"],
    "fsdp2 of the Trainer": [Path(__file__).with_name("as_on_gpus.py"), "train", "--training.fsdp", "full_shard"],
}


def launched(way: str, settings: Path, output: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """``train`` in the processes of the example's config; ``way`` is one of ``WAYS``."""
    program, (verb, *own) = WAYS[way][: WAYS[way].index("train")], WAYS[way][WAYS[way].index("train") :]
    file = ROOT / "examples" / FILES["shards" if way == "fsdp2 of accelerate" else "copies"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", file),
            *(*program, verb, settings, *own, "--output", output, *options),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [each["loss"] for each in log if "loss" in each]


@needs_gloo
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_train_the_adapter_of_one(way, quantized, float_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    settings = {
        "model": float_model if "float" in way else quantized,
        "data": str(tmp_path / "rows.jsonl"),
        **({"quantization": {"group_size": 32}} if "float" in way else {}),
        "eval_data": str(tmp_path / "rows.jsonl"),
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "use_cpu": True},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    batch = "--training.per_device_train_batch_size"
    assert main(["train", str(tmp_path / "train.yaml"), "--output", str(tmp_path / "one"), batch, "4"]) == 0
    done = launched(way, tmp_path / "train.yaml", tmp_path / "two", batch, "2")
    assert done.stdout.count("trained 4 steps") == 1  # one of them tells
    if WAYS[way][-1] == "mlx":
        assert json.loads((tmp_path / "two" / "evaluation.json").read_text())["kl"] >= 0
        assert (tmp_path / "two" / "exported" / "export.yaml").is_file()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)  # logged to four digits
    one, two = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("one", "two"))
    assert one.keys() == two.keys()
    records = [(tmp_path / each / "quantlayers_base.json").read_text() for each in ("one", "two")]
    assert records[0] == records[1]
    for name, tensor in one.items():
        # Adam makes whole steps of gradients that are rounding alone.
        assert float((two[name] - tensor).norm() / tensor.norm()) < 0.05, name


@needs_gloo
def test_a_run_that_accelerate_shards_is_merged_and_goes_on_with_its_checkpoints(quantized, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    training = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "use_cpu": True}
    settings = {"model": quantized, "data": str(tmp_path / "rows.jsonl"), "training": training}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(settings))
    way, out = "fsdp2 of accelerate", tmp_path / "out"
    launched(way, tmp_path / "train.yaml", out, "--merge", "auto")
    assert main(["merge", str(out), str(tmp_path / "by_hand")]) == 0
    merged, by_hand = (load_file(each / "model.safetensors") for each in (out / "merged", tmp_path / "by_hand"))
    assert merged.keys() == by_hand.keys()
    assert all(tensor.equal(by_hand[name]) for name, tensor in merged.items())
    whole = (losses(out), (out / "adapter_model.safetensors").read_bytes())
    shutil.rmtree(out / "checkpoint-4")
    (out / "adapter_model.safetensors").unlink()
    done = launched(way, tmp_path / "train.yaml", out, "--training.resume_from_checkpoint", "true")
    assert "4/4" in done.stderr
    assert "1/4" not in done.stderr  # it makes steps 3 and 4
    assert (losses(out), (out / "adapter_model.safetensors").read_bytes()) == whole


def test_what_sharding_cannot_do_is_refused_before_anything_is_loaded(quantized, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    command = ["train", quantized, str(tmp_path / "out"), "--data", str(tmp_path / "rows.jsonl"), "--fsdp_size", "2"]
    for options, said in (
        (["--merge", "auto"], "--merge needs the whole base in one process"),
        (["--training.resume_from_checkpoint", "true"], "cannot be resumed"),
        (["--evaluate", str(tmp_path / "rows.jsonl")], "--evaluate needs the whole base in one process"),
        (["--export", "mlx"], "--export needs the whole base in one process"),
    ):
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_refused_with_the_way_out(monkeypatch):
    from peft_quantlayers.integrations.before_training import check_before_training

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"DeepSpeed flattens parameters.*Use DDP, or FSDP2"):
        check_before_training(torch.nn.Linear(2, 2))
