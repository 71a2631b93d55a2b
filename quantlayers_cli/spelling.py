"""What was meant by a name that does not exist."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(value: Any, choices: Iterable[Any]) -> str:
    """``" (did you mean ...?)"``, or nothing where no choice is spelled nearly like ``value``."""
    names = [choice for choice in choices if isinstance(choice, str)]
    found = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.5) if isinstance(value, str) else []
    found = found or [name for name in names if isinstance(value, str) and value and (value in name or name in value)]
    return f" (did you mean {found[0]!r}?)" if found else ""
