"""The forms that rows come in, made into those of TRL: text, messages, prompt and completion."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..calibration.texts import with_role


def from_alpaca(row: dict[str, Any]) -> dict[str, Any]:
    """Prompt and completion of a row with instruction, input and output; the prompt alone where it has none, or pairs.

    Raises:
        ValueError: one of them is no text.
    """
    parts = [row.get(name) for name in ("instruction", "input", "output")]
    if not all(isinstance(part, str | None) for part in parts):
        raise ValueError(f"instruction, input and output are texts, and a row has {str(row)[:80]}. Mend this row.")
    prompt = "".join(f"{part}\n\n" for part in parts[:2] if part)
    return {"prompt": prompt} if "chosen" in row or parts[2] is None else {"prompt": prompt, "completion": parts[2]}


def is_sharegpt(chats: Iterable[Any]) -> bool:
    """Whether turns of ``chats`` have the entries from and value."""
    return any("from" in turn for chat in chats if isinstance(chat, list) for turn in chat)


def with_roles(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with role and content of turns in either form."""
    return [dict(with_role(turn)) for turn in turns]


def joined(row: dict[str, Any]) -> dict[str, Any]:
    """One text, or one chat, of a row with prompt and completion, or with instruction and output.

    Of preferences it is what was chosen.

    Raises:
        ValueError: one of both is text, and the other one messages.
    """
    whole = {"chosen": row.get("chosen"), **(from_alpaca(row) if "instruction" in row else row)}
    values = [whole[part] for part in ("prompt", "completion", "chosen") if whole.get(part)]
    if all(isinstance(value, list) for value in values):
        return {"messages": [message for value in values for message in value]}
    if not all(isinstance(value, str) for value in values):
        raise ValueError(f"a row has text and messages in prompt and completion: {str(row)[:80]}. Give one of both.")
    return {"text": "".join(values)}


def question_of(row: dict[str, Any]) -> list[dict[str, str]] | str:
    """What a model is asked in a row of any form: messages up to the last answer, or a text."""
    if "instruction" in row:
        return from_alpaca(row)["prompt"].strip()
    asked = next((row[name] for name in ("conversations", "messages", "prompt", "text") if row.get(name)), "")
    if not isinstance(asked, list):
        return asked
    messages = with_roles(asked)
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
