"""Regular expressions of an adapter's config, tried before PEFT uses them: some backtrack for ever on some names.

They are tried in a process of their own, since nothing can interrupt a match: the names and the expression are all
that it gets. Only expressions that repeat something twice are tried, so lists of names cost nothing.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

CPU_SECONDS = 5.0
"""What matching all names of a model may take. Ordinary expressions take milliseconds for ten thousand names."""
_WALL_SECONDS = 120

_TRIAL = """
import json, re, signal, sys
if hasattr(signal, "setitimer"):
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which kills
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
pattern, names = json.load(sys.stdin)
compiled = re.compile(pattern)
for name in names:
    compiled.fullmatch(name), compiled.match(name)
"""
_REPETITIONS = "*+{"


def check_patterns(config: Any, model: nn.Module) -> None:
    """Raise ValueError if matching an expression of ``config`` with the module names of ``model`` does not end.

    Args:
        config: of a PEFT adapter.
        model: that the adapter is for.
    """
    names: list[str] | None = None
    for field, text, pattern in _patterns(config):
        if sum(pattern.count(character) for character in _REPETITIONS) < 2:
            continue
        names = names or [name for name, _ in model.named_modules()]
        if not _ends(pattern, names):
            raise ValueError(
                f"{field}={text[:200]!r}: matching this regular expression with the model's {len(names)} module names "
                f"does not end within {CPU_SECONDS:g} s. Name the modules in a list, or write it without one "
                "repetition inside another. The model was not changed."
            )


def _patterns(config: Any) -> Iterator[tuple[str, str, str]]:
    """Field, text in it, and the expression that PEFT makes of that."""
    for field, made in (
        ("target_modules", "{}"),
        ("exclude_modules", "{}"),
        ("layers_pattern", r"(?:^|.*?\.){}\.(\d+)\."),
        ("modules_to_save", r"(^|.*\.){}($|\..*)"),
        ("rank_pattern", r"(.*\.)?({})$"),
        ("alpha_pattern", r"(.*\.)?({})$"),
    ):
        value = getattr(config, field, None)
        # A list of targets holds names, which PEFT compares.
        is_listed = isinstance(value, Iterable) and not isinstance(value, str) and made != "{}"
        for text in value if is_listed and value is not None else [value]:
            if isinstance(text, str) and any(character in text for character in _REPETITIONS):
                yield field, text, made.replace("{}", text)


def _ends(pattern: str, names: list[str]) -> bool:
    """Whether all matches end in time; True too for what is not an expression, which PEFT refuses."""
    command = [sys.executable, "-I", "-S", "-c", _TRIAL, str(CPU_SECONDS)]
    try:
        done = subprocess.run(
            command,
            input=json.dumps([pattern, names]).encode(),
            capture_output=True,
            check=False,
            timeout=_WALL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return False
    except OSError as error:
        logger.debug("no process to try the expression %r in (%s)", pattern, error)
        return True
    return done.returncode >= 0  # negative: stopped by the limit
