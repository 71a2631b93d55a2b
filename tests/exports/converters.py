"""Converters of other programs for tests: in a child of this process, which has imported what takes them seconds."""

import logging
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import pytest


def run_in_child(arguments, environment):
    """What ``own_process.run_python`` does, in a fork of this process, which has loaded torch and transformers."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                status = _run(list(arguments), environment)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        output.seek(0)
        return status, output.read()


def _run(arguments, environment):
    logging.root.handlers.clear()  # pytest's
    os.environ.clear()
    os.environ.update(environment)
    for folder in reversed(environment.get("PYTHONPATH", "").split(os.pathsep)):
        sys.path.insert(0, folder)
    if arguments[0] != "-m":  # a script, with a package gguf of its own beside it
        sys.path.insert(0, str(Path(arguments[0]).parent))
        for name in [name for name in sys.modules if name.partition(".")[0] == "gguf"]:
            del sys.modules[name]
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@pytest.fixture(autouse=True)
def in_a_child(monkeypatch):
    """Import it into a file of tests, whose converters then start at once."""
    monkeypatch.setattr("peft_quantlayers.exports.own_process.run_python", run_in_child)
