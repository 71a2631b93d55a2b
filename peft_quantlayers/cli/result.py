"""What a verb came to: text for a person, and data for a program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a verb prints.

    Fields:
        text: a few lines.
        data: the same and more, JSON-able; printed instead with ``--json``.
        exit_code: 0, or 1 where the answer itself is bad news (a damaged folder).
        output: the folder that was written, if any: settings and versions are saved in it.
        settings_name: of the file that they are saved in; None for that of the verb.
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    output: str | None = None
    settings_name: str | None = None


# Tensors that a line names.
_SHOWN = 5


def not_finite_line(names: Sequence[str]) -> str:
    """What to say of tensors with NaN or Inf."""
    more = f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else ""
    return (
        f"NaN or Inf in {len(names)} tensors: {', '.join(names[:_SHOWN])}{more}. The files are damaged, or the "
        "training that made them failed."
    )
