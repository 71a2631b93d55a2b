"""Processes that calibrate together write the bytes of one, whatever is shared, and none waits for one that ended."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import transformers
from _tiny_models import tiny_model
from mixtures import tiny_mixture
from processes import in_processes, needs_gloo, run_file
from tiny_folder import byte_tokenizer, save_tiny_llama

import peft_quantlayers as pql
from peft_quantlayers.calibration.layer_passes import LayerPasses
from peft_quantlayers.calibration.process_group import ALONE, Processes
from peft_quantlayers.cli import main
from peft_quantlayers.methods import hqq
from peft_quantlayers.streaming import quantize_files
from peft_quantlayers.streaming.gloo_processes import GlooProcesses, LostProcessError
from peft_quantlayers.streaming.launched_processes import quantize_in_group
from peft_quantlayers.streaming.walking_processes import host_store, joined

ROOT = Path(__file__).parents[2]
IDS = torch.randint(3, 100, (600,), generator=torch.Generator().manual_seed(3))
HQQ = pql.HQQConfig(nbits=3, group_size=16)
AQLM = pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=4, rounds=1)
# What is calibrated, to what, and how. Five calls, so that one of two processes has a call more.
CASES = {
    "plain": ("LlamaForCausalLM", HQQ, {}),
    "symmetric": ("LlamaForCausalLM", HQQ, {"asymmetric_targets": False}),
    "best codes": ("LlamaForCausalLM", HQQ, {"initial_codes": "best"}),
    "finetuned": ("LlamaForCausalLM", HQQ, {"finetune_epochs": 2}),
    "aqlm": ("LlamaForCausalLM", AQLM, {}),
    "nf4": ("LlamaForCausalLM", pql.NF4Config(block_size=16), {}),
    "head": ("LlamaForCausalLM", pql.HQQConfig(group_size=16, quantize_lm_head=True), {}),
    "embeddings": ("LlamaForCausalLM", pql.HQQConfig(group_size=16, quantize_embeddings=8), {}),
    "tied": ("Gemma2ForCausalLM", HQQ, {}),
    "encoder and decoder": ("T5ForConditionalGeneration", HQQ, {}),
    "a tower without data": ("LlavaForConditionalGeneration", HQQ, {}),
    "mixture": ("qwen3_moe", HQQ, {}),
    "mixture, finetuned": ("qwen3_moe", HQQ, {"finetune_epochs": 1}),
    "mixture of transposed experts": ("gpt_oss", HQQ, {}),
    "mixture, aqlm": ("mixtral", AQLM, {}),
    "one call for two": ("LlamaForCausalLM", HQQ, {"n_tokens": 128, "sequence_length": 128}),
}  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".yaml"}


@needs_gloo
def test_two_processes_write_the_files_of_one(tmp_path):
    for name in {name for name, *_ in CASES.values()}:
        (tiny_model(name) if hasattr(transformers, name) else tiny_mixture(name)).save_pretrained(tmp_path / name)
    run_file(__file__, "same", tmp_path)


@needs_gloo
def test_what_one_process_cannot_do_ends_both_and_both_go_on_later(tmp_path):
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path / "float")
    run_file(__file__, "broken", tmp_path)


@needs_gloo
def test_processes_give_each_other_values(tmp_path):
    run_file(__file__, "values", tmp_path)


def test_a_process_alone_makes_everything_and_holds_nothing():
    made = []
    turns = ALONE.in_turns(3, lambda index: made.append(index) or index)
    assert next(turns) == 0
    assert made == [0]
    assert list(turns) == [1, 2]
    assert ALONE.shared_out([1.0, 2.0], lambda index: index) == [0, 1]
    assert ALONE.own([4, 5]) == [4, 5]


def test_the_largest_layers_are_shared_out_first():
    class Three(Processes):
        size = 3

    assert Three()._owners([3.0, 1.0, 1.0, 2.0]) == [0, 2, 2, 1]


# ---- processes that end

# The command line, in all processes, which import it again. ``END`` names the one that is killed in the second block.
PROGRAM = """
import os, signal, sys, time
from peft_quantlayers.streaming.calibrated import _StreamingVisitor
from peft_quantlayers.cli import main
visit, n_groups = _StreamingVisitor.visit_group, 0

def slow(self, group):
    global n_groups
    n_groups += 1
    time.sleep(float(os.environ.get("PAUSE", "0")))
    if n_groups == 6 and os.environ.get("END") == str(self.processes.rank):
        os.kill(os.getpid(), signal.SIGKILL)
    visit(self, group)

_StreamingVisitor.visit_group = slow
if __name__ == "__main__":
    sys.exit(main())
"""


needs_signals = pytest.mark.skipif(os.name != "posix", reason="Windows has other signals")


@pytest.fixture
def command(tmp_path) -> list[str]:
    """``quantize`` with calibration, less the folder that it writes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    model, text = save_tiny_llama(tmp_path / "float", byte_tokenizer()), tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    fields = {"data": text, "n_tokens": 640, "sequence_length": 64, "batch_size": 1}
    options = [word for name, value in fields.items() for word in (f"--calibration.{name}", str(value))]
    return ["quantize", str(model), "--group_size", "32", *options]


def started(command: list[str], out: Path, n_processes: int, **environment: str) -> subprocess.Popen[str]:
    paths = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [*command, "--output", str(out), "--n_processes", str(n_processes)]
    return subprocess.Popen(
        [sys.executable, out.parent / "program.py", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | paths | environment,
    )


def others(running: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that it has started to share its work."""
    try:
        return [each for each in psutil.Process(running.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    except psutil.Error:
        return []


def assert_gone(processes: Iterable[psutil.Process]) -> None:
    psutil.wait_procs(processes, timeout=30)
    assert not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in processes)


@needs_gloo
@needs_signals
@pytest.mark.parametrize("ended", ["0", "2"])
def test_a_killed_process_ends_all_and_any_number_goes_on(ended, command, tmp_path):
    out = tmp_path / "out"
    running, seen = started(command, out, 3, END=ended), set()

    def watch() -> None:
        while running.poll() is None and len(seen) < 2:
            seen.update(others(running))

    thread = threading.Thread(target=watch)
    thread.start()
    said = running.communicate(timeout=150)[1]
    thread.join()
    assert len(seen) == 2
    assert_gone(seen)
    if ended == "0":
        assert running.returncode == -signal.SIGKILL
    else:
        assert running.returncode == 1
        lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("peft-quantlayers")]
        assert len(lines) == 1
        assert "a process that shares the calibration has ended" in lines[0]
        assert "with any number of processes" in lines[0]
        assert "unexpected" not in lines[0]
    assert len(list((out / ".quantizing").glob("*.safetensors"))) == 2  # what lies around the blocks, the first of two
    assert main([*command, "--output", str(out), *(["--n_processes", "2"] if ended == "0" else [])]) == 0
    assert main([*command, "--output", str(tmp_path / "expected")]) == 0
    assert files(out) == files(tmp_path / "expected")


@needs_gloo
@needs_signals
def test_killed_at_any_moment_it_ends_with_the_same_files(command, tmp_path):
    assert main([*command, "--output", str(tmp_path / "expected")]) == 0
    drawn, n_done = random.Random(0), 0
    n_kills = max(2, int(os.environ.get("KILLS", "0")) // 4)  # each takes a quarter of a minute
    while n_kills > 0:
        out = tmp_path / str(n_done)
        running = started(command, out, drawn.choice([1, 2, 3]), PAUSE="0.2")
        while running.poll() is None and not (out / ".quantizing" / "run.json").exists():
            time.sleep(0.02)
        time.sleep(drawn.uniform(0, 12))
        rest = others(running)
        victim = drawn.choice([psutil.Process(running.pid), *rest]) if running.poll() is None else None
        if victim is not None:
            victim.kill()
            n_kills -= 1
        said = running.communicate(timeout=100)[1]
        assert_gone(rest)
        assert running.returncode in (0, 1, -signal.SIGKILL)
        assert running.returncode != 1 or "a process that" in said  # Python may warn of semaphores after it
        n_done += running.returncode == 0
    out = tmp_path / str(n_done)
    assert main([*command, "--output", str(out)]) == 0
    assert all(files(tmp_path / str(each)) == files(tmp_path / "expected") for each in range(n_done + 1))


# ---- in each of two processes


def _same(rank: int, folder: Path) -> None:
    for name, (source, config, fields) in CASES.items():
        calibration = _calibration(**fields)
        seen: list[int] = []
        init = LayerPasses.__init__

        def counted(self, block, calls, init=init, seen=seen, **options):
            seen.append(len(calls))
            init(self, block, calls, **options)

        LayerPasses.__init__ = counted
        quantize_in_group(folder / source, folder / f"{name} two", config, calibration=calibration, progress=False)
        LayerPasses.__init__ = init
        if "finetune_epochs" not in fields and source.endswith("CausalLM"):
            assert set(seen) == ({1 - rank} if name == "one call for two" else {3 - rank}), (name, seen)
        if rank == 0:
            quantize_files.quantize_checkpoint(
                folder / source, folder / f"{name} one", config, calibration=calibration, progress=False
            )
            found, expected = files(folder / f"{name} two"), files(folder / f"{name} one")
            assert found.keys() == expected.keys()
            assert [each for each in found if found[each] != expected[each]] == [], name


def _calibration(**fields) -> pql.Calibration:
    return pql.Calibration(**({"data": IDS, "n_tokens": 320, "sequence_length": 64, "batch_size": 1} | fields))


def _broken(rank: int, folder: Path) -> None:
    out, quantize = folder / "out", hqq.HQQMethod.quantize
    made: list[int] = []

    def failing(self, weight, spec, **options):
        made.append(len(weight))
        if rank == 1 and len(made) == 4:
            raise ValueError("this weight cannot be quantized.")
        return quantize(self, weight, spec, **options)

    hqq.HQQMethod.quantize = failing
    with pytest.raises(ValueError, match="this weight cannot be quantized"):
        quantize_in_group(folder / "float", out, HQQ, calibration=_calibration(), progress=False)
    hqq.HQQMethod.quantize = quantize
    dist.barrier()
    assert (out / ".quantizing").is_dir()
    # What is no result of one process ends the other one too.
    passes = LayerPasses.outputs

    def without_memory(self):
        raise MemoryError("no memory for outputs")

    if rank == 1:
        LayerPasses.outputs = without_memory
    with pytest.raises((MemoryError, LostProcessError), match="no memory for outputs"):
        quantize_in_group(folder / "float", out, HQQ, calibration=_calibration(), progress=False)
    LayerPasses.outputs = passes
    dist.barrier()
    # Data that the model cannot take is refused by all, before and while they walk.
    with pytest.raises(ValueError, match="vocabulary"):
        quantize_in_group(folder / "float", folder / "no", HQQ, calibration=IDS + 10**6, progress=False)
    dist.barrier()
    assert not (folder / "no").exists()
    quantize_in_group(folder / "float", out, HQQ, calibration=_calibration(), progress=False)
    quantize_in_group(folder / "float", out, HQQ, calibration=_calibration(), progress=False)  # it is there
    if rank == 0:
        one = folder / "one"
        quantize_files.quantize_checkpoint(folder / "float", one, HQQ, calibration=_calibration(), progress=False)
        assert files(out) == files(one)


def _values(rank: int, folder: Path) -> None:
    box = [None]
    store = host_store("127.0.0.1", 2) if rank == 0 else None
    if store is not None:
        box = [store.port]
    dist.broadcast_object_list(box, src=0)
    together = (
        GlooProcesses(store, 0, 2, device=None) if store is not None else joined("127.0.0.1", box[0], 1, 2, None)
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.int64, torch.bool):
        for shape in ((), (0, 3), (3, 2)):
            value = torch.ones(shape, dtype=dtype)
            found = together.gathered(lambda value=value: {"a": (rank, value), "b": None})
            assert [each["a"][0] for each in found] == [0, 1]
            assert all(torch.equal(each["a"][1], value) and each["a"][1].dtype == dtype for each in found)
    rows = torch.arange(12.0).view(3, 4)
    assert torch.equal(together.of_first(lambda: rows.t()[1:] if rank == 0 else None), rows.t()[1:])
    assert list(together.in_turns(5, lambda index: (index, rank))) == [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]
    assert together.shared_out([5, 1, 1], lambda index: (index, rank)) == [(0, 0), (1, 1), (2, 1)]
    assert together.own([0, 1, 2]) == [[0, 2], [1]][rank]

    def refuse() -> None:
        if rank == 1:
            raise OSError(28, "the disk is full")

    with pytest.raises(OSError, match="the disk is full") as caught:
        together.gathered(refuse)
    assert caught.value.errno == 28
    if rank == 1:
        together.close()
    else:
        with pytest.raises(LostProcessError, match="may have been killed"):
            together.gathered(lambda: 1)


def _run(rank: int, what: str, folder: str) -> None:
    {"same": _same, "broken": _broken, "values": _values}[what](rank, Path(folder))


if __name__ == "__main__":
    in_processes(_run)
