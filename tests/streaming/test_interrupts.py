"""Ctrl-C, and whatever else ends a quantization in several processes, ends all of them; the call after it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from tiny_folder import byte_tokenizer, save_tiny_llama

from peft_quantlayers.cli import main
from peft_quantlayers.streaming import quantize_files

ROOT = Path(__file__).parents[2]
# The command line with parts so small that a tiny model has several. It is a module: processes import it again.
PROGRAM = """
import sys
from peft_quantlayers.streaming import quantize_files
quantize_files.PART_BYTES = 20_000
from peft_quantlayers.cli import main
if __name__ == "__main__":
    sys.exit(main())
"""
# In an interpreter that has not yet started multiprocessing's resource tracker, whose start changes the mask.
MASK = """
import multiprocessing, signal, time
from peft_quantlayers.streaming.processes import interrupts_held_back
if __name__ == "__main__":
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with interrupts_held_back():
        process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
        process.start()
        print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))
    print(signal.pthread_sigmask(signal.SIG_BLOCK, []) == before)
    process.join()
"""
needs_signals = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")


@pytest.fixture(autouse=True)
def interrupts_reach_new_processes():
    """Those of a program in the background of a shell would leave them out, as it does itself."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def started(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | paths | environment,
    )


def wait_for(holds, *, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def said_by(running: subprocess.Popen[str]) -> list[str]:
    """What the package printed before all of the processes had ended.

    After a kill a process that Python has not started quite yet may say that it misses the rest of its work.
    """
    text = running.communicate(timeout=120)[1]
    assert "Traceback" not in text or running.returncode == -signal.SIGKILL
    return [line for line in text.replace("\r", "\n").splitlines() if line.startswith("peft-quantlayers")]


@needs_signals
@pytest.mark.parametrize("is_calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_what_ends_the_first_process_ends_all_and_is_said_in_one_line(sent, is_calibrated, tmp_path, monkeypatch):
    model, out = str(save_tiny_llama(tmp_path / "float", byte_tokenizer())), tmp_path / "out"
    options, calibration = ["--group_size", "32", "--n_processes", "2"], []
    if is_calibrated:  # where the first process is one of them
        (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 30)
        calibration = ["--calibration.data", str(tmp_path / "text.txt"), "--calibration.n_tokens", "512"]
        options = ["--group_size", "32", "--n_processes", "3", *calibration]
    (tmp_path / "program.py").write_text(PROGRAM)
    running = started([str(tmp_path / "program.py"), "quantize", model, str(out), *options])
    parent = psutil.Process(running.pid)
    wait_for(lambda: len(parent.children()) >= 3)  # and multiprocessing's own
    children = parent.children()
    # A terminal sends Ctrl-C to all of them; a kill meets one.
    os.killpg(running.pid, sent) if sent == signal.SIGINT else running.send_signal(sent)
    lines = said_by(running)
    if sent == signal.SIGINT:
        assert running.returncode == 130
        assert lines == ["peft-quantlayers quantize: interrupted. What was saved before is as it was."]
    wait_for(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))
    assert not (out / "config.json").exists()
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
    for folder in (out, tmp_path / "expected"):
        assert main(["quantize", model, str(folder), "--group_size", "32", *calibration]) == 0
    name = "model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


@needs_signals
def test_a_process_that_is_started_inherits_the_mask(tmp_path):
    (tmp_path / "program.py").write_text(MASK)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


@needs_signals
@pytest.mark.parametrize(
    ("rank", "expected"), [("0", ["peft-quantlayers: interrupted. Nothing was begun."]), ("1", [])]
)
def test_an_interrupt_while_python_imports_the_package_is_one_line_of_the_first_process(rank, expected):
    running = started(["-m", "peft_quantlayers", "inspect", "no-such-folder"], RANK=rank)
    process = psutil.Process(running.pid)
    wait_for(lambda: any("torch" in mapped.path for mapped in process.memory_maps()))  # which is imported below it
    os.killpg(running.pid, signal.SIGINT)
    assert said_by(running) == expected
    assert running.returncode == -signal.SIGINT
