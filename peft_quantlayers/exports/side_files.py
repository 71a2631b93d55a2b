"""What lies beside the tensors: tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..storage.other_files import CARD, copy_other_files
from .export_report import ExportReport
from .formats.format_base import ExportFormat

REPORT, GENERATION = "export_report.json", "generation_config.json"
# Any of them makes a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    """Whether there are files of a tokenizer in ``folder``."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def copy_side_files(source: Path, destination: Path, *, tokenizer: Any, tokenizer_folder: Path | None) -> None:
    """Copy what engines need beside the tensors.

    Args:
        source: the model's folder.
        destination: the exported one.
        tokenizer: saved with its own ``save_pretrained``; None for the files in ``tokenizer_folder``.
        tokenizer_folder: where the tokenizer's files are; None if there are none.
    """
    copy_other_files(source, destination)
    if tokenizer_folder is not None and tokenizer_folder != source:
        copy_other_files(tokenizer_folder, destination)
        if (source / GENERATION).is_file():  # of the model, not of the one that the tokenizer is from
            shutil.copyfile(source / GENERATION, destination / GENERATION)
    (destination / REPORT).unlink(missing_ok=True)  # of an earlier export
    if tokenizer is not None:
        tokenizer.save_pretrained(destination)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in ``folder`` has a chat template."""
    config = folder / "tokenizer_config.json"
    in_config = config.is_file() and bool(json.loads(config.read_text()).get("chat_template"))
    return in_config or any((folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json"))


def write_card(folder: Path, report: ExportReport, export_format: ExportFormat, notes: Sequence[str] = ()) -> None:
    """The model card: what the files are, what reads them, and the command that serves them."""
    before, after = report.bits
    lines = [
        "---",
        f"tags: [quantized, {export_format.name}]",
        "---",
        "",
        f"Exported by `peft_quantlayers` in the format `{export_format.name}` ({export_format.holds}), for "
        f"{', '.join(export_format.engines)}.",
        "",
        "```bash",
        report.serving_command,
        "```",
        "",
        f"{len(report.layers)} quantized layers, {before:.2f} bits per weight before the export, {after:.2f} after, "
        + ("exact" if report.is_exact else f"relative error of the weights {report.relative_error:.2g}")
        + f"; `{REPORT}` has each layer.",
        *("" if index == 0 else note for index, note in enumerate(("", *report.notes, *notes))),
        "",
    ]
    (folder / CARD).write_text("\n".join(lines))
