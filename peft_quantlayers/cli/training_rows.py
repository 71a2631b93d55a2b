"""The rows that a training is given, in the forms that people have, made into those that TRL's trainers take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from ..calibration.texts import one_split, text_of
from .models import config_of
from .read_data import load_data
from .row_forms import from_alpaca, is_sharegpt, with_roles
from .rows import check_texts

# Columns that rows must have, in each of the forms that a trainer takes, and the same in words.
FORMS = {
    "sft": ({"text"}, {"messages"}, {"prompt", "completion"}, {"input_ids"}),
    "dpo": ({"chosen", "rejected"},),
}
ROWS = {
    "sft": "rows with text, messages or conversations, prompt and completion, or instruction and output",
    "dpo": "rows with prompt (or instruction), chosen and rejected; without prompt, chosen and rejected are messages",
}
# Columns whose values are looked at in each row.
OF_ROWS = {
    *("text", "messages", "conversations", "prompt", "completion", "instruction", "output", "chosen", "rejected"),
    "input_ids",
}

# Columns that may hold chats.
CHATS = {"messages", "prompt", "completion", "chosen", "rejected"}


def load_rows(option: str, settings: Namespace, tokenizer: Any) -> Any:
    """The dataset of ``option`` in the forms that TRL's trainer takes.

    Raises:
        ValueError: no rows; columns that no form has; a row with another kind of value, by its line; chats, and a
            tokenizer without a template to write them.
    """
    name, trainer, text = settings[option], settings.trainer, settings.training.get("dataset_text_field") or "text"
    rows = load_data(option, name)
    if isinstance(rows, Path):
        from datasets import Dataset

        rows = Dataset.from_dict({text: [part for part in text_of(rows).split("\n\n") if part.strip()]})
    if hasattr(rows, "keys"):
        rows = one_split(rows)
    if not len(rows):
        raise ValueError(f"--{option} {name} holds no rows.")
    columns = set(rows.column_names)
    vocab_size = getattr(config_of(settings.model).get_text_config(), "vocab_size", None) or len(tokenizer)
    check_texts(option, name, rows, sorted(columns & {*OF_ROWS, text}), vocab_size=vocab_size)
    if "conversations" in columns and "messages" not in columns:
        rows = rows.rename_column("conversations", "messages")
    elif "instruction" in columns and columns & {"output", "chosen"}:
        rows = rows.map(from_alpaca, remove_columns=[each for each in columns if each not in ("chosen", "rejected")])
    rows = _with_roles(rows)
    columns = set(rows.column_names)
    form = next((form for form in FORMS[trainer] if columns >= {text if key == "text" else key for key in form}), None)
    if form is None:
        raise ValueError(
            f"--{option} {name} has the columns {sorted(columns)}. --trainer {trainer} takes {ROWS[trainer]}."
        )
    first = rows[0][text if form == {"text"} else min(form)]
    if isinstance(first, list) and form != {"input_ids"}:
        _check_template(option, settings, tokenizer)
    elif form == {"text"} and not any(value.strip() for value in rows[text]):
        raise ValueError(f"--{option} {name} holds no text: {text} is empty in all of {len(rows)} rows.")
    return rows


def _with_roles(rows: Any) -> Any:
    """``rows`` whose chats have messages with role and content."""
    for column in CHATS & {*rows.column_names}:
        if is_sharegpt(rows[column]):
            # Under another name first: datasets would give the messages the entries of the turns.
            rows = rows.rename_column(column, f"_{column}")
            rows = rows.map(_roles_of, fn_kwargs={"column": column}, remove_columns=[f"_{column}"])
    return rows


def _roles_of(row: dict[str, Any], *, column: str) -> dict[str, Any]:
    return {column: with_roles(row[f"_{column}"])}


def _check_template(option: str, settings: Namespace, tokenizer: Any) -> None:
    if getattr(tokenizer, "chat_template", None) is None and not settings.training.get("chat_template_path"):
        raise ValueError(
            f"--{option} {settings[option]} holds chats, and the tokenizer of {settings.tokenizer or settings.model} "
            "has no chat template to write them as text. Name one that has: --tokenizer FOLDER_OR_NAME, or a "
            "template: --training.chat_template_path FILE."
        )
