"""What lies beside the weights in a model's folder: tokenizer, chat template, generation config, card. Copied."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

CARD = "README.md"
_SUFFIXES = {".json", ".jinja", ".model", ".tiktoken", ".txt", ".vocab", ".bpe"}
_LEGAL = ("license", "notice", "use_policy")
_FOLDERS = ("additional_chat_templates",)
# Written again, of the weights, or of a training run.
_LEFT_OUT = {"config.json", "trainer_state.json", "quantize_config.json", "adapter_config.json", "all_results.json"}


def copy_other_files(source: Path, destination: Path) -> None:
    """Copy what a saved model needs beside config and weights."""
    for path in sorted(source.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)
        elif path.is_file() and _belongs_to_model(path.name):
            shutil.copyfile(path, destination / path.name)


def _belongs_to_model(name: str) -> bool:
    if name in _LEFT_OUT or name.endswith(".index.json") or name.startswith("."):
        return False
    return Path(name).suffix in _SUFFIXES or name.lower().startswith(_LEGAL)


def joined_card(card: str, source: Path) -> str:
    """``card`` of the quantized model, with what the card in ``source`` says: its metadata and its text."""
    file = source / CARD
    if not file.is_file():
        return card
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        own, base = ModelCard(card), ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, TypeError, yaml.YAMLError):  # metadata that are none
        return f"{card}\n# Card of the float model\n\n{text}"
    of_base, of_own = base.data.to_dict(), own.data.to_dict()
    tags = [*_as_list(of_base.get("tags")), *_as_list(of_own.get("tags"))]
    fields = of_base | of_own | {"tags": list(dict.fromkeys(tags))}
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True).strip()
    return f"---\n{front}\n---\n{own.text.rstrip()}\n\n# Card of the float model\n\n{base.text.strip()}\n"


def _as_list(tags: Any) -> list[str]:
    return [tags] if isinstance(tags, str) else list(tags or ())
