"""A process that is killed while it saves or quantizes leaves the old model or the new one to whoever loads next.

20 moments of each, or as many as FUZZ_KILLS says; ``make fuzz`` takes 200. A moment is the n-th event that Python
reports of the file system (opening, renaming, removing, making a folder): so every step between two of them is met,
and the moments are the same in each run.
"""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import models
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import peft_quantlayers as pql

from .forked import Outcome, run_forked
from .subjects import SHARD_SIZE, digest_of

N_MOMENTS = int(os.environ.get("FUZZ_KILLS", "20"))
EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile", "shutil.rmtree", "os.truncate")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def counting(function: Callable[[], None], folder: Path, *, kill_at: int | None) -> Callable[[], int]:
    """Runs ``function`` and gives the number of events in ``folder`` and beside it; dies at event ``kill_at``."""

    def call() -> int:
        count = 0

        def hook(event: str, args: tuple) -> None:
            nonlocal count
            # renames relative to an open folder (shutil.rmtree) have no full path
            if event in EVENTS and args and (str(folder.parent) in str(args[0]) or event in ("os.remove", "os.rmdir")):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        function()
        return count

    return call


def moments(n_events: int, n_moments: int) -> list[int]:
    """At most ``n_moments`` of the events, spread evenly from the first to the last."""
    return sorted({1 + round(i * (n_events - 1) / max(1, n_moments - 1)) for i in range(n_moments)})


def killed(function: Callable[[], None], folder: Path, moment: int) -> None:
    outcome = run_forked(counting(function, folder, kill_at=moment))
    assert outcome.kind == "hang", outcome  # that is what a SIGKILL looks like


def loaded(folder: Path) -> Outcome:
    return run_forked(lambda: digest_of(AutoModelForCausalLM.from_pretrained(folder)))


def hidden_files(folder: Path) -> list[str]:
    return [path.name for parent in (folder, folder.parent) for path in parent.glob(".*saving*")]


def model_of(seed: int) -> torch.nn.Module:
    model = models.load("hqq_mixed")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.mul_(1 + seed / 8)
    return model


STARTS = ("new", "empty", "old", "old and other files")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("shard_size", ["1GB", SHARD_SIZE], ids=["one file", "sharded"])
def test_saving(start, shard_size, tmp_path):
    # Half of the moments where there is most to lose.
    n_moments = N_MOMENTS // 2 if (start, shard_size) == (STARTS[-1], SHARD_SIZE) else max(2, N_MOMENTS // 14)
    old, new = model_of(0), model_of(1)
    template = tmp_path / "template" / "model"
    if start == "empty":
        template.mkdir(parents=True)
    elif start != "new":
        pql.save_model(old, template, max_shard_size=shard_size)
    if start == "old and other files":
        (template / "mine").mkdir()
        (template / "mine" / "thesis.txt").write_text("precious")
    digests = {digest_of(old): "old", digest_of(new): "new"}

    def fresh(name: object) -> Path:
        folder = tmp_path / str(name) / "model"
        folder.parent.mkdir()
        return shutil.copytree(template, folder) if template.exists() else folder

    def save_to(folder: Path) -> Callable[[], None]:
        return lambda: pql.save_model(new, folder, overwrite=True, max_shard_size=shard_size)

    counted = fresh("counted")
    n_events = run_forked(counting(save_to(counted), counted, kill_at=None)).value
    assert n_events > 20
    found = []
    for moment in moments(n_events, n_moments):
        folder = fresh(moment)
        killed(save_to(folder), folder, moment)
        outcome = loaded(folder)
        if outcome.kind == "returned":
            found.append(digests[outcome.value])
        elif start in ("new", "empty") and not (folder / "config.json").exists():
            found.append("nothing yet")
        else:
            raise AssertionError((moment, outcome))
        if start == "old and other files":
            assert (folder / "mine" / "thesis.txt").read_text() == "precious"
        save_to(folder)()
        assert digests[loaded(folder).value] == "new"
        assert hidden_files(folder) == []
        assert pql.verify_model(folder) == []
        shutil.rmtree(folder.parent)
    assert found[0] == ("old" if start.startswith("old") else "nothing yet")
    print(f"\n{n_events} events: { ({kind: found.count(kind) for kind in found}) }")


def test_quantizing_with_a_resume_folder(tmp_path):
    """Killed anywhere, a second call gives the tensors of an uninterrupted one, and leaves only its own files."""
    expected = {name: tensor.clone() for name, tensor in models.calibrated(tmp_path / "whole").state_dict().items()}
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    folder = tmp_path / "counted" / "blocks"
    n_events = run_forked(counting(lambda: models.calibrated(folder), folder, kill_at=None)).value
    assert n_events >= 6
    for moment in moments(n_events, N_MOMENTS):
        folder = tmp_path / str(moment) / "blocks"
        killed(lambda folder=folder: models.calibrated(folder), folder, moment)
        state = models.calibrated(folder).state_dict()
        assert all(torch.equal(state[name], expected[name]) for name in expected), moment
        assert sorted(path.name for path in folder.iterdir()) == files
