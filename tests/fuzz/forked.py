"""Run a function in a forked child with limits of time and memory, and say what came of it.

A fork costs milliseconds where an import of torch costs seconds. The child has one thread: OpenMP's others are not
there after a fork.
"""

import json
import logging
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import peft_quantlayers

PACKAGE = str(Path(peft_quantlayers.__file__).parent)
CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 20, 120, 3 * 2**30
# What a refusal may be; any other error that our code raises is a fault of ours.
REFUSALS = (ValueError, TypeError, OSError, NotImplementedError, ImportError)


@dataclass(frozen=True)
class Outcome:
    """What a child did.

    Fields:
        kind: "returned", "refused by us", "refused by others", "bare error of ours", "hang", "crash".
        value: what the function returned, as JSON has it.
        message: of the error.
        told: what it wrote to stderr, warnings too.
    """

    kind: str
    value: Any = None
    message: str = ""
    told: str = ""


def run_forked(function: Callable[[], Any]) -> Outcome:
    """The outcome of ``function`` in a child, whose value must be JSON-able."""
    reader, writer = os.pipe()
    told = tempfile.TemporaryFile()  # noqa: SIM115 (the child writes to it)
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            _child(function, writer, told.fileno())
        except BaseException:
            os.write(told.fileno(), traceback.format_exc().encode())
        finally:
            os._exit(1)
    os.close(writer)
    text, deadline = b"", time.monotonic() + WALL_SECONDS
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            part = pipe.read(2**16)
            if not part:
                break
            text += part
        else:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    told.seek(0)
    said = told.read().decode(errors="replace")
    told.close()
    if text:
        return Outcome(told=said, **json.loads(text))
    is_slow = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    return Outcome("hang" if is_slow else "crash", message=f"status {status}", told=said)


def _child(function: Callable[[], Any], writer: int, stderr: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.dup2(stderr, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has replaced them
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)  # pytest keeps them to itself
    warnings.resetwarnings()
    warnings.simplefilter("always")
    for name in ("transformers", ""):
        logging.getLogger(name).addHandler(logging.StreamHandler(sys.stderr))
    try:
        result = {"kind": "returned", "value": function()}
    except BaseException as error:
        result = {"kind": _kind_of(error), "message": f"{type(error).__name__}: {error}"[:2000]}
        traceback.print_exc()
    sys.stderr.flush()
    os.write(writer, json.dumps(result).encode())
    os._exit(0)


def _kind_of(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or not frames[-1].filename.startswith(PACKAGE):
        return "refused by others"
    # PEFT's own error about a state dict, to which the name of the file was added.
    is_named = isinstance(error, RuntimeError) and "adapter_model.safetensors" in str(error)
    return "refused by us" if is_named or isinstance(error, REFUSALS) else "bare error of ours"
