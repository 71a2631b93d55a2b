"""Run a Python program as in a process of its own, without the eight seconds that importing other packages takes.

The standard library's fork server imports PEFT and transformers once for each pytest worker; a program is a fork of
it, with its own arguments, folder, environment and output, and imports our packages itself. A program that tests in
which order other packages are imported, or how much memory they take, is started the ordinary way.
"""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def run_program(
    *arguments: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run([sys.executable, *arguments], ...)`` gives, output as text.

    Args:
        arguments: as Python takes them: a file, ``-m`` and a module, or ``-c`` and code; then the program's own.
        cwd: the folder it runs in; this process's if None.
        env: its whole environment; this process's if None.
        timeout: in seconds.

    Raises:
        subprocess.TimeoutExpired: the program was stopped.
    """
    words = [str(argument) for argument in arguments]
    context = fork_server()
    with tempfile.NamedTemporaryFile() as out, tempfile.NamedTemporaryFile() as error:
        place = str(cwd or Path.cwd())
        environment = dict(os.environ if env is None else env)
        process = context.Process(target=_run, args=(words, place, environment, out.name, error.name))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(words, timeout, Path(out.name).read_text(), Path(error.name).read_text())
        return subprocess.CompletedProcess(
            [sys.executable, *words], process.exitcode, Path(out.name).read_text(), Path(error.name).read_text()
        )


def memory_measured_by(program: str, *arguments: object) -> Any:
    """What the code ``program`` prints last, as JSON, in an interpreter of its own where freed memory is gone at once.

    Otherwise glibc keeps it, and what is resident differs by tens of MiB with what was run before.
    """
    malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=os.environ | malloc | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def fork_server() -> ForkServerContext:
    """The server, which was started where it was not yet; its processes have imported :mod:`preloaded`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded"])
    # It imports at its start, and finds modules by the environment alone.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def _run(words: list[str], cwd: str, env: dict[str, str], out: str, error: str) -> None:
    """In the child: what the interpreter does with its command line."""
    for number, name in ((1, out), (2, error)):
        file = os.open(name, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    first, *rest = words
    beside = "" if first in ("-c", "-m") else str(Path(first).parent)
    sys.path[:0] = [beside, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")
