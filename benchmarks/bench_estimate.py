"""``pql estimate`` beside what the verbs take: peak memory of quantize, train and merge, each in a process of its own.

    python benchmarks/bench_estimate.py [--models SmolLM2 1B] [--steps quantize train] [--folder FOLDER]
    python benchmarks/bench_estimate.py --estimate_again     # the measured rows stay

SmolLM2-135M, and a Llama of 1.2 billion random bfloat16 weights that is made on disk. What counts is what an estimate
says: memory that the process allocates (RssAnon), and the mapped pages of weights. They are read from /proc/PID/smaps
every 50 ms, less often if reading takes long. Linux only. Seconds are the processor's, so that other work on the
machine does not count, without those of a run that imports the same and does nothing. Rows are written as they are
made.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

from _demo_model import demo_model_folder
from _device import describe_device
from bench_streaming import write_checkpoint

RESULTS = Path(__file__).parent / "results" / "estimate.json"
WIKITEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"
TOKENS, CALIBRATION_TOKENS, TRAIN_STEPS, RANK = 512, 1024, 4, 8
VOCABULARY = 49152  # of SmolLM2's tokenizer
MODELS: dict[str, dict[str, int] | None] = {
    "SmolLM2": None,
    "1B": {"hidden": 2048, "layers": 16},
    "1B, 2 blocks": {"hidden": 2048, "layers": 2},
    "8B, 2 blocks": {"hidden": 4096, "layers": 2, "intermediate": 14336},
}
# Verb by step, in the order in which they need each other.
STEPS = ("quantize", "quantize, calibrated", "train", "merge")


def peak_of(*arguments: str) -> tuple[int, float]:
    """Bytes that ``python -m peft_quantlayers ARGUMENTS`` takes at its worst moment, and its processor's seconds."""
    start, peak = children_seconds(), 0
    with tempfile.TemporaryFile("w+") as said:
        running = subprocess.Popen(
            [sys.executable, "-m", "peft_quantlayers", *arguments], stdout=subprocess.DEVNULL, stderr=said, text=True
        )
        while running.poll() is None:
            began = time.monotonic()
            peak = max(peak, taken(running.pid))
            # Looking at gigabytes takes a while, for which the kernel holds the process up.
            time.sleep(min(max(0.05, 10 * (time.monotonic() - began)), 2.0))
        if running.returncode != 0:
            said.seek(0)
            raise SystemExit(f"{' '.join(arguments)} failed: {said.read()[-2000:]}")
    return peak, children_seconds() - start


def children_seconds() -> float:
    """Of the processor, that the processes which this one started and waited for have taken."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def taken(pid: int) -> int:
    """Anonymous memory, and resident pages of safetensors files, now."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except (OSError, ProcessLookupError):  # it has just ended
        return 0
    total, is_weights = 0, False
    for line in lines:
        name, _, value = line.partition(":")
        if name == "Anonymous" or (is_weights and name == "Rss"):
            total += int(value.split()[0]) * 1024
        elif "-" in name.split(" ")[0]:
            is_weights = line.endswith(".safetensors")
    return total


@cache
def estimates(model: Path, *options: str) -> dict[str, Any]:
    """What ``pql estimate`` says of each step."""
    command = [sys.executable, "-m", "peft_quantlayers", "estimate", str(model), *options, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"estimate failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def make_model(name: str, folder: Path) -> Path:
    """The float model's folder, with SmolLM2's tokenizer."""
    sizes = MODELS[name]
    if sizes is None:
        return demo_model_folder()
    source = folder / name
    if not source.exists():
        write_checkpoint(source, vocabulary=VOCABULARY, **sizes)
        for file in demo_model_folder().glob("token*"):
            shutil.copy(file, source)
    return source


def write_texts(folder: Path) -> tuple[Path, Path]:
    """A text for calibration, and rows that are longer than what a step reads of each."""
    text = WIKITEXT.read_text(encoding="utf-8")
    calibration, rows = folder / "text.txt", folder / "rows.jsonl"
    calibration.write_text(text[:100_000])
    size = 10 * TOKENS
    rows.write_text("\n".join(json.dumps({"text": text[size * at : size * (at + 1)]}) for at in range(8)))
    return calibration, rows


def measure(step: str, source: Path, folder: Path) -> tuple[int, float]:
    """Peak bytes, and the processor's seconds without those of a start."""
    calibration, rows = write_texts(folder)
    base, tuned = folder / f"{source.name}-base", folder / f"{source.name}-tuned"
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    quantize = ("quantize", str(source), "--nbits", "4", "--output")
    train = (
        *("train", str(base), "--data", str(rows), "--lora.r", str(RANK), "--training.max_length", str(TOKENS)),
        *("--training.max_steps", str(TRAIN_STEPS), "--training.per_device_train_batch_size", "1"),
        *("--training.save_strategy", "no", "--training.use_cpu", "true", "--output"),
    )
    if step in ("train", "merge") and not base.exists():
        peak_of(*quantize, str(base))
    if step == "merge" and not tuned.exists():
        peak_of(*train, str(tuned))
    calibrated = ("--calibration.data", str(calibration), "--calibration.n_tokens", str(CALIBRATION_TOKENS))
    command: tuple[str, ...] = {
        "quantize": (*quantize, str(out)),
        "quantize, calibrated": (*quantize, str(out), *calibrated),
        "train": (*train, str(out)),
        "merge": ("merge", str(tuned), str(out)),
    }[step]
    start = (*command, "--show_batch") if step == "train" else ("inspect", str(source))
    peak, seconds = peak_of(*command)
    return peak, seconds - peak_of(*start)[1]


def told_of(source: Path, step: str) -> dict[str, Any]:
    """What ``pql estimate`` says of a step."""
    verb, _, calibrated = step.partition(", ")
    options = ["--calibration_tokens", str(CALIBRATION_TOKENS)] if calibrated else []
    told = estimates(source, "--nbits", "4", "--max_length", str(TOKENS), "--lora.r", str(RANK), *options)[verb]
    times = TRAIN_STEPS if told["per_step"] else 1
    return {"estimated_bytes": told["peak_bytes"], "estimated_s": told["seconds"] * times, "memory": told["memory"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=STEPS)
    parser.add_argument("--folder", type=Path, help="where models are made and kept; the system's temporary folder")
    parser.add_argument(
        "--estimate_again", action="store_true", help="only what estimate says, of rows that are there"
    )
    given = parser.parse_args()
    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {(row["model"], row["step"]): row for row in known}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.models:
            source = make_model(name, folder)
            for step in given.steps:
                if given.estimate_again:
                    if (name, step) not in rows:
                        continue
                    row = rows[name, step] | told_of(source, step)
                else:
                    peak, seconds = measure(step, source, folder)
                    row = {"model": name, "step": step, "measured_bytes": peak, "measured_cpu_s": seconds}
                    row |= told_of(source, step)
                print(json.dumps(row), flush=True)
                rows[name, step] = row
                in_order = sorted(
                    rows.values(), key=lambda row: (list(MODELS).index(row["model"]), STEPS.index(row["step"]))
                )
                RESULTS.write_text(json.dumps({"device": describe_device(), "rows": in_order}, indent=1) + "\n")


if __name__ == "__main__":
    main()
