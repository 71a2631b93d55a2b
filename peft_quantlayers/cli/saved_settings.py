"""The resolved settings of a verb, beside what it wrote: the same verb takes them again."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from jsonargparse import Namespace

from quantlayers_cli.options import PROGRAM

from ..storage import replace_file
from .parsing import VerbParser, settings_text

# Packages whose versions are saved beside an output.
VERSIONS_OF = ("peft_quantlayers", "torch", "transformers", "peft", "trl")


def save_settings(
    verb: str, parser: VerbParser, settings: Namespace, folder: Path, *, name: str | None = None
) -> None:
    """Write the resolved settings and the versions beside the output, into a file ``name``; None: ``VERB.yaml``."""
    name = name or f"{verb}.yaml"
    versions = ", ".join(f"{name} {_version(name)}" for name in VERSIONS_OF)
    head = f"# {PROGRAM} {verb} {name} does the same again.\n# Python {platform.python_version()}, {versions}\n"
    try:
        with replace_file(folder / name) as part:
            part.write_text(head + settings_text(parser, settings), encoding="utf-8")
    except OSError as error:
        reason = f"{folder} is complete, but for the settings in {name} ({error.strerror})."
        raise OSError(error.errno, reason) from error


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
