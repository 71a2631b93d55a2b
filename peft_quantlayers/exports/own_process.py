"""Programs of others that run in a process of their own: what they import and print stays with them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Lines of a program's output that an error shows.
_SHOWN_LINES = 5


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
        said = "\n  ".join([line for line in printed.splitlines() if line.strip()][-_SHOWN_LINES:])
        way_out = f" {way_out}" if way_out else ""
        raise ValueError(f"{program} does not take this model; nothing was written.{way_out} It says:\n  {said}")
