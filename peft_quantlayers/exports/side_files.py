"""What lies beside the tensors: tokenizer, chat template, generation config, model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .formats.base import ExportFormat
from .report import ExportReport

CARD, REPORT = "README.md", "export_report.json"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip


def has_tokenizer(folder: Path | None) -> bool:
    """Whether there are files of a tokenizer in ``folder``."""
    return folder is not None and any(
        (folder / name).is_file() for name in _TOKENIZER_FILES[:1] + _TOKENIZER_FILES[4:10]
    )


def copy_side_files(source: Path, destination: Path, *, tokenizer: Any, tokenizer_folder: Path | None) -> None:
    """Copy what engines need beside the tensors.

    Args:
        source: the model's folder.
        destination: the exported one.
        tokenizer: saved with its own ``save_pretrained``; None for the files in ``tokenizer_folder``.
        tokenizer_folder: where the tokenizer's files are; None if there are none.
    """
    names = [(source, name) for name in _OTHER_FILES]
    if tokenizer is not None:
        tokenizer.save_pretrained(destination)
    elif tokenizer_folder is not None:
        names += [(tokenizer_folder, name) for name in _TOKENIZER_FILES]
        templates = tokenizer_folder / "additional_chat_templates"
        if templates.is_dir():
            shutil.copytree(templates, destination / templates.name)
    for folder, name in names:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, destination / name)


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
