"""What a verb came to: text for a person, and data for a program."""

from __future__ import annotations

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
    """

    text: str
    data: dict[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    output: str | None = None
