"""``train`` that is killed at any moment and called again ends with the bytes of a run that was not."""

import json
import os
from pathlib import Path

import torch
import yaml
from killed_runs import folders_of_killed_runs
from transformers.trainer_utils import get_last_checkpoint

from peft_quantlayers.cli import main
from peft_quantlayers.report.training_parts import checkpoints

ROWS = [{"prompt": f"{number} and one is", "completion": f" {number + 1}."} for number in range(10, 26)]
RESULT = (
    *("adapter_model.safetensors", "adapter_config.json", "merged/config.json", "base/model.safetensors"),
    *("merged/merge.yaml", "evaluation.json", "after_training.json", "exported/model.safetensors"),
)
MERGED = "merged/model.safetensors"


def settings_file(folder: Path, model: str) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    training = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    settings = {
        "model": model,
        "data": str(folder / "rows.jsonl"),
        "lora": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1},
        "merge": "requantize",
        "evaluate": str(folder / "rows.jsonl"),
        "evaluate_options": {"window": 32},
        "export": "mlx",
        "training": {**training, "save_total_limit": 2, "resume_from_checkpoint": "true", "dataloader_num_workers": 0},
    }
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    return folder / "train.yaml"


def content_of(folder: Path) -> dict[str, object]:
    """Bytes of all files, without the folder's name; of the merged model, which transformers writes, with a header in
    any order."""
    found: dict[str, object] = {
        name: (folder / name).read_bytes().replace(bytes(folder), b"") for name in RESULT if (folder / name).exists()
    }
    merged = (folder / MERGED).read_bytes()
    end = 8 + int.from_bytes(merged[:8], "little")
    return found | {MERGED: (json.loads(merged[8:end]), merged[end:])}


def test_train_killed_at_any_moment_ends_with_the_same_files(float_model, tmp_path):
    file = settings_file(tmp_path, float_model)  # which is quantized first

    def run(folder):
        torch.set_num_threads(1)
        assert main(["train", str(file), "--output", str(folder), "--quantization.group_size", "32"]) == 0

    run(tmp_path / "expected")
    folders = folders_of_killed_runs(run, tmp_path / "all", int(os.environ.get("KILLS", "4")), seed=2, seconds=4.0)
    assert folders
    assert content_of(tmp_path / "expected").keys() == {*RESULT, MERGED}
    assert all(content_of(each) == content_of(tmp_path / "expected") for each in folders)


def test_a_finished_run_that_is_called_again_makes_no_step_more(quantized, tmp_path, capsys):
    file = settings_file(tmp_path, quantized)
    command = ["train", str(file), "--output", str(tmp_path / "out"), "--merge", "null"]
    assert main(command) == 0
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    assert main(command) == 0
    assert "all 6 steps had been trained" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before
    assert main([*command, "--training.max_steps", "8"]) == 0
    assert "trained 8 steps" in capsys.readouterr().out


def test_a_checkpoint_that_was_half_written_is_passed_over(tmp_path):
    for step, state in ((2, "{}"), (10, "{}"), (4, "{}"), (12, '{"epoch": 0.'), (14, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert get_last_checkpoint(tmp_path).endswith("checkpoint-14")  # what transformers would take
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-4", "checkpoint-2"]
