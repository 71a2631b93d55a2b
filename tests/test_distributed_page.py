"""The blocks of docs/distributed.md: in one process, in two of gloo, and as commands of ``accelerate launch``."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.distributed as dist
from hub import MODEL_NAME, tiny_hub
from processes import in_processes, needs_gloo, run_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "distributed.md").read_text()
CHATS = [{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Seals."}]}] * 8


def blocks(heading: str, language: str = "python") -> list[str]:
    """The code under a heading; an empty one is for what stands before the first."""
    under = dict(zip(*[iter(["", *re.split(r"^## (.*)\n", PAGE, flags=re.M)])] * 2, strict=True))
    return re.findall(rf"^```{language}\n(.*?)^```", under[heading], re.M | re.S)


def sharded(rank: int, folder: str) -> None:
    """The blocks on FSDP2, of which the loop needs gradients."""
    load, loop, save = blocks("FSDP2: the base sharded over the processes")
    os.chdir(folder)
    names = {"torch": torch}
    exec(load, names)
    names["model"](input_ids=torch.arange(8)[None] + rank, labels=torch.arange(8)[None]).loss.backward()
    exec(loop, names)
    gradients = [p.grad.clone() for p in names["trained"]]
    for gradient in gradients:
        dist.broadcast(gradient, src=0)
    assert all(torch.equal(p.grad, first) for p, first in zip(names["trained"], gradients, strict=True))
    assert any(float(gradient.norm()) > 0 for gradient in gradients)
    exec(save, names)


@needs_gloo
def test_its_blocks_shard_train_save_and_merge(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tiny_hub(tmp_path / "hub")))
    names = {"name": MODEL_NAME}
    (first,) = blocks("")
    exec(first, names)
    run_file(__file__, str(tmp_path))
    (merging,) = blocks("Merging")
    exec(merging, names)
    assert (tmp_path / "merged" / "model.safetensors").exists()


@needs_gloo
@pytest.mark.parametrize("command", "".join(blocks("The command line, with accelerate", "bash")).splitlines())
def test_its_commands_run_in_both_processes(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tiny_hub(tmp_path / "hub")))
    exec(blocks("")[0], {"name": MODEL_NAME})
    Path("quantized").rename("base")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(MODEL_NAME).save_pretrained("base")
    Path("chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    Path("my_script.py").write_text(
        "import os, sys; print('rank', os.environ['RANK'], 'peft_quantlayers' in sys.modules)"
    )
    Path("examples").symlink_to(ROOT / "examples")
    program, verb, *arguments = shlex.split(command)
    assert (program, verb) == ("accelerate", "launch")
    options = ["--training.max_steps", "2", "--training.use_cpu", "true"] if "train" in arguments else []
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *arguments, *options],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    if "train" in arguments:
        assert done.stdout.count("trained 2 steps") == 1
        assert Path("tuned/adapter_model.safetensors").exists()
    else:
        assert sorted(re.findall(r"rank (\d) (\w+)", done.stdout)) == [("0", "True"), ("1", "True")]


if __name__ == "__main__":
    in_processes(sharded)
