"""Values of options that are refused whatever the files and the machine hold: wrong usage, with its exit code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from jsonargparse import Namespace

from quantlayers_cli.option_names import WrongUsage


@contextmanager
def values_refused() -> Iterator[None]:
    """While this is open, a ValueError or TypeError, of a class that options fill, is a WrongUsage."""
    try:
        yield
    except WrongUsage:
        raise
    except (ValueError, TypeError) as error:
        refused = WrongUsage(str(error))
        for note in getattr(error, "__notes__", ()):
            refused.add_note(note)
        raise refused from None


def check_at_least(settings: Namespace, least: float, *names: str, most: float = math.inf) -> None:
    """Raise WrongUsage for options whose value, if there is one, is below ``least``, above ``most`` or no number."""
    for name in names:
        value = settings.get(name)
        if value is not None and not (least <= value <= most and math.isfinite(value)):
            bounds = f"at least {least}" + (f", and at most {most}" if math.isfinite(most) else "")
            raise WrongUsage(f"--{name} {value} must be {bounds}.")
