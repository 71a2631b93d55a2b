"""``peft-quantlayers run PROGRAM ...``: other people's programs, with this package imported first.

The program runs in this process, as ``python`` would run it. The Python processes that it starts (those of
``accelerate launch``, of ``trl``) import the package too, by way of :data:`AUTOLOAD_FOLDER` in their ``PYTHONPATH``.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from pathlib import Path

from .spelling import nearest

AUTOLOAD_FOLDER = str(Path(__file__).parent / "autoload")
"""In ``PYTHONPATH`` this folder has a Python process import the package; see ``autoload/sitecustomize.py``."""

RUN_HELP = """Import this package, and run a program as if it were called without it:

  peft-quantlayers run trl sft --model_name_or_path DIR ...      a command of the environment
  peft-quantlayers run lm_eval --model hf ...
  peft-quantlayers run -m package.module ...                     as python -m
  peft-quantlayers run script.py ...                             as python script.py
  peft-quantlayers run accelerate launch train.py ...            also in the processes that a program starts

All arguments after PROGRAM are the program's, and so is the exit code."""

WRONG_USAGE = 2
_PYTHONS = ("python", "python3", os.path.basename(sys.executable))


def run(arguments: Sequence[str]) -> int:
    """Run the program that ``arguments`` name with its own arguments; the exit code where it does not exit itself."""
    program, *rest = _without_python(list(arguments)) or [""]
    start = _start_of(program, rest)
    if isinstance(start, str):
        return _refused(start)
    # Who sets this variable registers by hand, and a program cannot.
    os.environ.pop("PEFT_QUANTLAYERS_NO_REGISTER", None)
    importlib.import_module("peft_quantlayers").register()
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([AUTOLOAD_FOLDER, *filter(None, inherited)])
    return start() or 0


def _refused(reason: str) -> int:
    print(f"peft-quantlayers run: {reason}", file=sys.stderr)
    return WRONG_USAGE


def _without_python(arguments: list[str]) -> list[str]:
    """``arguments`` without what says that they are Python's: ``--``, and the interpreter itself."""
    while arguments and arguments[0] in ("--", *_PYTHONS):
        del arguments[0]
    return arguments


def _start_of(program: str, arguments: list[str]) -> Callable[[], int | None] | str:
    """What runs ``program``; or why there is none, as text."""
    if program == "-m":
        if not arguments:
            return "-m needs the name of a module."
        module, *arguments = arguments
        return lambda: _run_module(module, arguments)
    if not program or program.startswith("-"):
        given = f"{program!r} is no program. Give" if program else "which program? Give"
        return f"{given} a command, a script, or -m and a module; `run --help` shows examples."
    if os.sep in program or program.endswith((".py", ".pyz")):
        return _misfit(program) or (lambda: _run_file(program, arguments))
    found = shutil.which(program)
    commands = {entry.name: entry for entry in entry_points(group="console_scripts")}
    if program in commands:
        return lambda: _run_function(commands[program].load(), found or program, arguments)
    if found is None:
        return f"there is no command {program!r} in this environment{nearest(program, commands)}."
    if _is_python(Path(found)):
        return lambda: _run_file(found, arguments)
    return lambda: os.execv(found, [program, *arguments])  # a shell, say: only the processes that it starts are ours


def _misfit(file: str) -> str | None:
    """Why ``python FILE`` could not begin; what is wrong in a script, Python says itself."""
    if not os.path.exists(file):
        return f"there is no file {file}."
    if os.path.isdir(file):
        is_program = os.path.isfile(os.path.join(file, "__main__.py"))
        return None if is_program else f"{file} is a folder without a __main__.py. Name a script."
    if not os.access(file, os.R_OK):
        return f"{file} cannot be read: there is no permission."
    with open(file, "rb") as opened:
        first = opened.readline(200)
    # A long path to Python is written by pip for the shell, in a way that Python reads too.
    if first.startswith(b"#!") and b"python" not in first and b"'''exec'" not in first:
        reader = os.path.basename(first[2:].split()[-1].decode(errors="replace")) if first[2:].split() else "sh"
        return (
            f"{file} is no Python script. Give the program that reads it first: peft-quantlayers run {reader} {file}."
        )
    return None


def _module_misfit(name: str) -> str | None:
    """Why ``python -m NAME`` could not begin; the packages that it lies in are imported, as that does."""
    try:
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f"{name}.__main__")
            return None if found else f"{name} is a package without a __main__. Name a module in it."
    except (ImportError, ValueError):  # a package above it; a relative name
        found = None
    return None if found else f"there is no module {name or repr(name)} in this environment."


def _run_module(module: str, arguments: list[str]) -> int | None:
    sys.argv = [module, *arguments]  # runpy puts the file in the place of the name
    _set_first_path(os.getcwd())
    if (reason := _module_misfit(module)) is not None:
        return _refused(reason)
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return None


def _run_file(file: str, arguments: list[str]) -> None:
    sys.argv = [file, *arguments]
    if os.path.isfile(file):  # runpy does this for a folder or an archive
        _set_first_path(os.path.dirname(os.path.realpath(file)))
    runpy.run_path(file, run_name="__main__")


def _run_function(function: Callable[[], int | None], command: str, arguments: list[str]) -> int | None:
    sys.argv = [command, *arguments]
    return function()


def _set_first_path(folder: str) -> None:
    """Where Python looks for modules first: the place of this command's own file gives way, as in ``python FILE``."""
    if not sys.flags.safe_path:
        sys.path[0] = folder


def _is_python(file: Path) -> bool:
    """Whether an executable is a Python script, by its first line."""
    with file.open("rb") as opened:
        first = opened.readline(200)
    return first.startswith(b"#!") and b"python" in first
