"""Rows that a verb is given: each is looked at, and the first wrong one is named by its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# The entries of a message, in the two forms of chats.
MESSAGE = (("role", "content"), ("from", "value"))
# Columns that rows of one form have.
FORMS = (
    ("chosen", "rejected"), ("prompt", "completion"), ("instruction", "output"), ("messages",), ("conversations",),
    ("text",), ("input_ids",),
)  # fmt: skip
_SHOWN = 60
_A_ROW = 'a row looks like {"text": "..."}'


def check_texts(option: str, name: str, rows: Any, columns: Iterable[str], *, vocab_size: int = 2**63) -> None:
    """Raise ValueError for the first row in which one of ``columns`` is neither text nor a chat.

    A column is text in all rows, or a chat in all. ``input_ids`` are token ids below ``vocab_size``.
    """
    for column in columns:
        kinds: set[str] = set()
        for number, value in enumerate(_values(option, name, rows[column])):
            kind, misfit = _kind_of(column, value, vocab_size)
            kinds.add(kind)
            if misfit is None and len(kinds) > 1:
                misfit = f"is {kind}, and in rows before it is {next(iter(kinds - {kind}))}"
            if misfit is not None:
                if value is None and (mixed := _mixed_forms(name, rows)) is not None:
                    raise ValueError(f"--{option} {name}: {mixed}. Give rows of one form.")
                raise ValueError(
                    f"--{option} {name}, {place_of(name, number)}: {column} {misfit}. Mend this row, or remove it."
                )


def _values(option: str, name: str, column: Any) -> Iterator[Any]:
    try:
        yield from column
    except UnicodeDecodeError as error:
        wrong = first_wrong_line(Path(name).expanduser()) if name.lower().endswith((".jsonl", ".json")) else None
        raise ValueError(f"--{option} {name}: {wrong or error}. Write it as UTF-8.") from None


def _mixed_forms(name: str, rows: Any) -> str | None:
    """The first two rows of different forms, and the forms; None where all have one."""
    first: tuple[str, ...] | None = None
    for number, row in enumerate(rows):
        form = next((form for form in FORMS if all(row.get(column) is not None for column in form)), None)
        if form is not None and first is None:
            first, first_place = form, place_of(name, number)
        elif form not in (None, first):
            return f"{place_of(name, number)} has {_and(form)}, and {first_place} has {_and(first)}"
    return None


def _and(names: Iterable[str] | None) -> str:
    return " and ".join(names or ())


def place_of(name: str, number: int) -> str:
    """Where row ``number`` of a file stands: its line, where each row has one."""
    path = Path(name).expanduser()
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return f"row {number + 1}"
    with path.open("rb") as opened:
        lines = [line for line, content in enumerate(opened, 1) if content.strip()]
    return f"line {lines[number]}" if number < len(lines) else f"row {number + 1}"


def first_wrong_line(path: Path) -> str | None:
    """What is wrong with a .jsonl file, in its first line that holds no row, or with a .json file; None: nothing."""
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            return str(error)
        wrong = next((row for row in (content if isinstance(content, list) else [content]) if not _is_row(row)), None)
        is_right = all(map(_is_row, content)) if isinstance(content, list) else _is_row(content)
        return None if is_right else f"it holds {_shown(wrong)}, and {_A_ROW}"
    kinds: dict[str, type] = {}
    with path.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else {}
            except json.JSONDecodeError as error:
                return f"line {number} is no JSON ({error.msg} at character {error.pos + 1})"
            except UnicodeDecodeError:
                return f"line {number} is no text in UTF-8"
            if not _is_row(row):
                return f"line {number} holds {_shown(row)}, and {_A_ROW}"
            for key, value in row.items():
                if value is not None and kinds.setdefault(key, type(value)) is not type(value):
                    return f"line {number}: {key} is {_shown(value)}, and {kinds[key].__name__} in lines before it"
    return None


def begins_with_null(path: Path) -> bool:
    """Whether the first thing in a file of JSON is null, at which the package datasets crashes."""
    with path.open("rb") as opened:
        return opened.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()[:4] == b"null"


def _is_row(value: Any) -> bool:
    return isinstance(value, dict)


def _kind_of(column: str, value: Any, vocab_size: int) -> tuple[str, str | None]:
    """``"text"``, ``"a chat"`` or ``"token ids"``, and what is wrong with it."""
    if column == "input_ids":
        value = value.tolist() if hasattr(value, "tolist") else value
        are_ids = isinstance(value, list) and all(type(each) is int and 0 <= each < vocab_size for each in value)
        wanted = f"token ids are whole numbers from 0 to {vocab_size - 1}"
        return "token ids", None if are_ids else f"holds {_shown(value)}, and {wanted}"
    if isinstance(value, list):
        return "a chat", _misfit_of_chat(value)
    if column in ("messages", "conversations"):
        return "a chat", f"is {_shown(value)}, and a chat is a list of messages"
    return "text", None if isinstance(value, str) else f"is {_shown(value)}, and no text"


def _misfit_of_chat(messages: list[Any]) -> str | None:
    if not messages:
        return "is a chat without messages"
    for message in messages:
        given = message if isinstance(message, Mapping) else {}
        pairs = [pair for pair in MESSAGE if pair[0] in given]
        # Rows of both forms in one file have all four entries, of which two are null.
        role, content = next((pair for pair in pairs if given[pair[0]] is not None), [*pairs, MESSAGE[0]][0])
        said = given.get(content)
        is_said = isinstance(said, str) or (content == "content" and (said or given.get("tool_calls")))
        if not isinstance(given.get(role), str) or not is_said:
            other = "" if pairs else ", or from and value"
            return f"has the message {_shown(message)}, and a message has {role} and {content}{other}"
    return None


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
