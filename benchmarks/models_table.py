"""Every generative model class of transformers, tiny, through quantizing, saving, loading, LoRA and merging.

Writes ``benchmarks/results/models.json``, from which ``tables.py`` makes ``docs/models.md``. Each class runs in a
process of its own with limits of time and memory. Classes that the file has already are not run again, unless a name
pattern or ``--again`` asks for it; ``--minutes`` ends the run early, and the next one goes on from there.
"""

import argparse
import fnmatch
import json
import logging
import multiprocessing
import os
import resource
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from _device import describe_device
from _model_journey import full_size, journey
from _tiny_models import generative_classes

RESULT = Path(__file__).parent / "results" / "models.json"
SECONDS, GIBIBYTES = 120, 8


def run(class_name: str) -> dict[str, Any]:
    """The row of one class, from a process of its own: a fork, so that nothing is imported again."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_in_child, args=(class_name, there))
    started = time.perf_counter()
    process.start()
    there.close()
    row: dict[str, Any] = {"build": f"no result in {SECONDS} s"}
    if here.poll(SECONDS):
        try:
            row = here.recv()
        except EOFError:
            process.join()
            row = {"build": f"the process died with exit code {process.exitcode}"}
    process.kill()
    process.join()
    return {"class": class_name, **row, "seconds": round(time.perf_counter() - started, 1)}


def _in_child(class_name: str, answer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30, GIBIBYTES << 30))
    with tempfile.TemporaryDirectory() as folder:
        answer.send(journey(class_name, Path(folder)) | {"full size": full_size(class_name)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("patterns", nargs="*", help="class names, * and ? allowed, to run again; default: what is new")
    parser.add_argument("--again", action="store_true", help="run all of them again")
    parser.add_argument("--minutes", type=float, default=60, help="start no class after this time")
    parser.add_argument("--output", type=Path, default=RESULT)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # A fork has no threads but its own: transformers would read files in others.
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    names = list(generative_classes())
    known = {}
    if args.output.exists() and not args.again:
        known = {row["class"]: row for row in json.loads(args.output.read_text())["rows"]}
    chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in args.patterns)]
    chosen = chosen if args.patterns else [name for name in names if name not in known]
    end = time.monotonic() + 60 * args.minutes
    for name in chosen:
        if time.monotonic() > end:
            break
        known[name] = run(name)
        print(json.dumps(known[name]), flush=True)
        rows = [known[name] for name in names if name in known]
        written = {"device": describe_device(), "classes": len(names), "rows": rows}
        args.output.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
