"""What ``export`` wrote, where a model is needed: refused with the engines that read it, and what it was made of."""

from __future__ import annotations

import json
from pathlib import Path

from quantlayers_cli.option_names import WrongUsage, read_options

from ..exports import export_formats
from ..exports.side_files import REPORT

# What ``export`` was given, in the folder that it wrote.
SETTINGS = "export.yaml"


def refuse_export(name: str) -> None:
    """Raise ValueError where ``name`` is a folder, or a file in one, that ``export`` wrote for another program."""
    folder = _folder(name)
    try:
        written = json.loads((folder / REPORT).read_text(encoding="utf-8"))["format"]
    except (OSError, ValueError, KeyError, TypeError):  # none there, or another program's
        written = None
    known = export_formats().get(written) if isinstance(written, str) else None
    is_gguf = Path(name).suffix.lower() == ".gguf" and Path(name).expanduser().is_file()
    is_gguf = is_gguf or (not (folder / "config.json").is_file() and any(folder.glob("*.gguf")))
    if (known is not None and not known.is_read_here) or is_gguf:
        raise export_refused(name, written if known is not None else None)


def export_refused(name: str, written: str | None = None) -> ValueError:
    """The error for a model of another engine, with the folder that it was exported from where its settings say it.

    ``written``: the name of the format, if it is known.
    """
    try:
        given = read_options(str(_folder(name) / SETTINGS))
    except WrongUsage:  # none there
        given = {}
    source = given.get("adapter") or given.get("model")
    engines = "another engine" if written is None else f"{', '.join(export_formats()[written].engines)} ({written})"
    return ValueError(
        f"{name} is an export for {engines}, which cannot be loaded here. Give the folder that it was exported "
        f"from{f', {source}' if source else ''}."
    )


def _folder(name: str) -> Path:
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else folder.parent
