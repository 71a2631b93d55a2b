"""``quantize`` in the two processes that torchrun starts writes the files of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import refused
from processes import in_processes, needs_gloo, run_file
from safetensors.torch import load_file, save_file

from peft_quantlayers import HQQConfig
from peft_quantlayers.cli import main
from peft_quantlayers.streaming import quantize_files
from peft_quantlayers.streaming.checkpoint_parts import PartsOfModel
from peft_quantlayers.streaming.launched_processes import quantize_in_group

ROOT = Path(__file__).parents[2]
CONFIG = HQQConfig(group_size=32)
BROKEN = "model.layers.1.mlp.down_proj"  # in a part of the second process


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".yaml"}


def launched(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "peft_quantlayers", *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )


@needs_gloo
@pytest.mark.parametrize("is_calibrated", [False, True], ids=["plain", "calibrated"])
def test_a_launched_verb_writes_the_files_of_one_process(is_calibrated, float_model, text_file, tmp_path):
    options = ["--group_size", "32"]
    if is_calibrated:
        options += ["--calibration.data", text_file, "--calibration.n_tokens", "512", "--calibration.batch_size", "1"]
        options += ["--calibration.sequence_length", "128"]
    assert main(["quantize", float_model, str(tmp_path / "one"), *options]) == 0
    done = launched("quantize", float_model, tmp_path / "two", *options, "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["quantized"][0]["layers"] == 14  # one of them tells
    assert files(tmp_path / "one") == files(tmp_path / "two")


@needs_gloo
def test_each_process_makes_parts_and_what_one_cannot_do_ends_all(float_model, tmp_path):
    run_file(__file__, float_model, tmp_path)


def test_what_goes_in_one_process_is_refused_in_several(float_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    command = ["quantize", float_model, str(tmp_path / "out"), "--group_size", "32"]
    for options, said in (
        (["--overwrite"], "Call it without the launcher"),
        (["--n_processes", "2"], "leave out --n_processes 2"),
    ):
        assert said in refused(capsys, [*command, *options], 2)
    assert not (tmp_path / "out").exists()


def _share(rank: int, float_model: str, folder: str) -> None:
    quantize_files.PART_BYTES = 2**14
    made: list[int] = []
    make = PartsOfModel.make

    def counted(self: PartsOfModel, work: object, number: int) -> None:
        made.append(number)
        make(self, work, number)

    PartsOfModel.make = counted
    two, failed = Path(folder) / "two", Path(folder) / "failed"
    quantize_in_group(float_model, two, CONFIG, progress=False)
    assert len(made) >= 2
    assert all(number % 2 == rank for number in made)
    made.clear()
    quantize_in_group(float_model, two, CONFIG, progress=False)  # it is there
    assert not made
    if rank == 0:
        quantize_files.quantize_checkpoint(float_model, Path(folder) / "one", CONFIG, progress=False)
        assert files(two) == files(Path(folder) / "one")
        tensors = load_file(Path(float_model) / "model.safetensors")
        broken = Path(folder) / "broken"
        broken.mkdir()
        for path in Path(float_model).iterdir():
            (broken / path.name).write_bytes(path.read_bytes())
        tensors[f"{BROKEN}.weight"][0, 0] = torch.nan
        save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    torch.distributed.barrier()
    with pytest.raises(ValueError, match=BROKEN):
        quantize_in_group(Path(folder) / "broken", failed, CONFIG, progress=False)
    assert len(list((failed / ".quantizing").glob("*.safetensors"))) >= 2
    with pytest.raises((ValueError, FileExistsError), match="not empty"):
        quantize_in_group(float_model, float_model + "/..", CONFIG, progress=False)


if __name__ == "__main__":
    in_processes(_share)
