"""Help texts of options, read from the docstrings of the classes that the options fill."""

from __future__ import annotations

import re


def field_help(cls: type) -> dict[str, str]:
    """What the ``Fields:`` blocks of ``cls`` and its bases say of each field, in one line each."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        block = re.search(r"^ *Fields:\n((?: +.*\n|\n)*)", vars(base).get("__doc__") or "", re.M)
        if block is None:
            continue
        indent = len(block[1]) - len(block[1].lstrip(" "))
        entries = re.split(rf"^ {{{indent}}}(?=\w)", block[1], flags=re.M)
        for entry in filter(None, (part.strip() for part in entries)):
            names, separator, text = entry.partition(":")
            if separator and re.fullmatch(r"\w+(?:, \w+)*", names):
                words = " ".join(text.split()).replace("``", "")
                found |= dict.fromkeys(names.split(", "), words)
    return found
