"""Programs of others that run in a process of their own: what they import and print stays with them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Lines of a program's output that an error shows.
_SHOWN_LINES = 5
# The last line of a traceback.
_ERROR = re.compile(r"[\w.]*(?:Error|Exception|Interrupt)\b")


def run_python(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[int, str]:
    """Run this Python with ``arguments``; its exit status, and what it printed, errors first."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, env=dict(environment)
    )
    return done.returncode, done.stderr + done.stdout


def convert_with(
    program: str, arguments: Sequence[str], environment: Mapping[str, str], made: Path, *, way_out: str = ""
) -> None:
    """Run a converter, called ``program`` in messages, that writes the file ``made``.

    ``way_out``: a sentence for the error.

    Raises:
        ValueError: it wrote none; with its last words.
    """
    status, printed = run_python(arguments, environment)
    if status != 0 or not made.is_file():
        said = "\n  ".join(_last_words([line for line in printed.splitlines() if line.strip()]))
        way_out = f" {way_out}" if way_out else ""
        raise ValueError(f"{program} does not take this model; nothing was written.{way_out} It says:\n  {said}")


def _last_words(lines: list[str]) -> list[str]:
    """The error at the end of a Python program's traceback, or the last lines of what it printed."""
    errors = [line.strip() for line in lines if _ERROR.match(line)]
    is_traceback = any(line.startswith("Traceback (most recent call last)") for line in lines)
    return errors[-1:] if is_traceback and errors else lines[-_SHOWN_LINES:]
