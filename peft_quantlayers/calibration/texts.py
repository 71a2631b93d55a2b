"""Texts, chats, datasets and token ids as sequences of token ids. No model is run here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..integrations.private_transformers import name_or_path

# Columns of a dataset and entries of a row that are read, the first that is there.
COLUMNS = ("input_ids", "text", "messages", "conversations")
# Files that hold one text; others hold rows.
TEXT_SUFFIXES = ("", ".txt", ".md", ".rst", ".py")
# Other names of roles, in datasets whose chats have the entries "from" and "value".
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}


def with_role(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """A turn with the entries "from" and "value" as a message with "role" and "content"; a message as it is."""
    if turn.get("role") is not None or turn.get("from") is None:
        return turn
    speaker = turn["from"].lower()
    return {"role": ROLES.get(speaker, speaker), "content": turn["value"]}


def token_sequences(
    data: Any, tokenizer: Any, model: nn.Module | None, *, n_tokens: int = 2**40, progress: bool = False
) -> list[Tensor]:
    """Token ids of ``data`` of any kind, as one-dimensional int64 tensors.

    Args:
        data: as :class:`Calibration` describes it, but no batches for the model's forward.
        tokenizer: for texts and chats; None for the model's own.
        model: for its tokenizer.
        n_tokens: of a dataset at most so many rows are read, evenly spread; an iterator is read until it has given
            so many tokens.
        progress: show a progress bar if it takes long.

    Raises:
        ValueError: no data, or a path that is no text.
        TypeError: data of an unknown kind, or of several kinds.
    """
    data = _opened(data, n_tokens)
    if isinstance(data, Tensor):
        if not data.numel():
            raise ValueError("the calibration data is empty.")
        if not data.dim():
            raise ValueError("the calibration data is a single number; give token ids, (n_tokens,) or (n, n_tokens).")
        return [row.long().cpu() for row in _as_ids(data).reshape(-1, data.shape[-1])]
    if isinstance(data, (bytes, set, frozenset)) or not isinstance(data, Iterable):
        raise TypeError(
            f"calibration data must be texts, token ids, a dataset or batches of them, got {type(data).__name__}. "
            "See Calibration."
        )
    encode = _Encoder(tokenizer, model)
    if isinstance(data, Sequence):
        items = [data] if _is_chat(data) else list(data)
        if not items:
            raise ValueError("the calibration data is empty.")
        _check_one_kind(items)
        items = [_content(item) for item in items]
        if all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            return [torch.tensor(items, dtype=torch.int64)]
        bar = tqdm(items, desc="Tokenizing", unit="text", disable=not progress, delay=2)
        return [ids for item in bar for ids in _ids_of(item, encode)]
    found: list[Tensor] = []
    for item in data:
        found += _ids_of(_content(item), encode)
        if sum(map(len, found)) >= n_tokens:
            break
    if not found:
        raise ValueError("the calibration data is empty.")
    return found


def one_split(data: Any) -> Any:
    """``data``, or the split "train" of a ``datasets.DatasetDict``, or its only one."""
    if not isinstance(data, Mapping) or not data or not all(hasattr(each, "column_names") for each in data.values()):
        return data
    if "train" in data or len(data) == 1:
        return data.get("train", next(iter(data.values())))
    splits = list(data)
    raise ValueError(f"the calibration data has the splits {splits} and no 'train'; give one, data[{splits[0]!r}].")


def _opened(data: Any, n_tokens: int) -> Any:
    """``data`` with files, splits, columns and arrays opened: a tensor, or something to iterate over."""
    data = one_split(data)
    if isinstance(data, Path):
        return [text_of(data)]
    if isinstance(data, str):
        _refuse_paths([data])
        return [data]
    if hasattr(data, "column_names") and data.column_names is not None and hasattr(data, "__len__"):
        return _rows(data, n_tokens)
    if isinstance(data, Mapping):
        content = _content(data)
        return [content] if isinstance(content, str) or _is_chat(content) else content
    if hasattr(data, "columns") and hasattr(data, "to_dict"):
        names = [str(name) for name in data.columns]
        raise TypeError(
            f"the calibration data is a table with the columns {names}: give one as a list, "
            f"data[{names[0] if names else 'text'!r}].tolist()."
        )
    if hasattr(data, "__array__") and not isinstance(data, Tensor):
        try:
            return torch.as_tensor(data)
        except (TypeError, ValueError):  # of texts
            return list(data)
    if isinstance(data, Sequence) and data and all(isinstance(item, str) for item in data):
        _refuse_paths(data)
    if isinstance(data, Sequence) and data and all(isinstance(item, Path) for item in data):
        return [text_of(item) for item in data]
    return data


def _rows(dataset: Any, n_tokens: int) -> list[Any]:
    """Rows of a ``datasets`` dataset, evenly spread if it has more than ``n_tokens``: a row has at least one token."""
    column = _column(dataset.column_names, "calibration dataset has the columns", "Rename one with rename_column.")
    step = max(1, len(dataset) // n_tokens)
    if step > 1:
        dataset = dataset.select(range(0, len(dataset), step))
    rows = list(dataset[column])
    if column != "input_ids" or "attention_mask" not in dataset.column_names:
        return rows
    masks = list(dataset["attention_mask"])
    return [_without_padding(ids, mask) for ids, mask in zip(rows, masks, strict=True)]


def _column(names: Iterable[str], said: str, remedy: str) -> str:
    """The one of ``names`` that is read: token ids before texts. ValueError where there is none."""
    names = [str(name) for name in names]
    for column in COLUMNS:
        if column in names:
            return column
    raise ValueError(
        f"the {said} {names}; it needs 'input_ids' or 'text', or chats in 'messages' or 'conversations'. {remedy} "
        "For inputs of another kind give batches of the model's forward keywords: see Calibration."
    )


def _content(item: Any) -> Any:
    """What is read of a row: its token ids, its text, or its chat; anything else as it is."""
    if not isinstance(item, Mapping):
        return item
    column = _column(item, "calibration data has rows with the entries", "Rename one.")
    if column == "input_ids" and "attention_mask" in item:
        return _without_padding(item["input_ids"], item["attention_mask"])
    return item[column]


def _without_padding(ids: Any, mask: Any) -> Any:
    """``ids`` where ``mask`` is not 0."""
    try:
        ids, mask = torch.as_tensor(ids), torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):  # rows of several lengths
        return [_without_padding(*row) for row in zip(ids, mask, strict=True)]
    return ids[mask != 0] if ids.shape == mask.shape else ids


def _is_message(item: Any) -> bool:
    return isinstance(item, Mapping) and ({"role", "content"} <= set(item) or {"from", "value"} <= set(item))


def _is_chat(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and bool(item) and all(_is_message(message) for message in item)


def _check_one_kind(items: Sequence[Any]) -> None:
    kinds = {
        "text"
        if isinstance(item, str)
        else "row"
        if isinstance(item, Mapping)
        else "chat"
        if _is_chat(item)
        else "ids"
        for item in items
    }
    if len(kinds) > 1:
        names = sorted({type(item).__name__ for item in items})
        raise TypeError(f"calibration data must be all texts or all token ids, got a list with {names}.")


def _ids_of(item: Any, encode: _Encoder) -> list[Tensor]:
    if isinstance(item, str):
        return [encode.text(item)] if item.strip() else []
    if _is_chat(item):
        return [encode.chat(item)]
    if isinstance(item, (list, tuple)) and item and all(isinstance(row, (list, tuple, Tensor)) for row in item):
        return [ids for row in item for ids in _ids_of(row, encode)]
    try:
        return [_as_ids(torch.as_tensor(item)).flatten().long().cpu()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"calibration data must be texts, integer token ids or a dataset: {error}") from None


def _as_ids(ids: Tensor) -> Tensor:
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise TypeError(f"token ids must be integers, got {ids.dtype}.")
    return ids


class _Encoder:
    """A tokenizer for texts and chats, loaded when the first of them comes."""

    def __init__(self, tokenizer: Any, model: nn.Module | None) -> None:
        self.given, self.model = tokenizer, model
        self.loaded: Any = None

    @property
    def tokenizer(self) -> Any:
        if self.loaded is None:
            self.loaded = self.given if self.given is not None else _tokenizer_of(self.model)
        return self.loaded

    @property
    def encode(self) -> Callable[..., Any]:
        """A processor of several kinds of input reads texts through its tokenizer."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        return inner if callable(inner) else self.tokenizer

    def text(self, text: str) -> Tensor:
        return torch.tensor(self.encode(text)["input_ids"], dtype=torch.int64)

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> Tensor:
        """The chat as the tokenizer's own template writes it, with the special tokens that the template has."""
        render = getattr(self.tokenizer, "apply_chat_template", None)
        if render is None or getattr(self.tokenizer, "chat_template", True) is None:
            raise ValueError(
                "the calibration data holds chats, and the tokenizer has no chat template to write them as text. Give "
                "the tokenizer of the chat model, set tokenizer.chat_template, or give texts."
            )
        try:
            text = render([with_role(message) for message in messages], tokenize=False)
        except TemplateError as error:
            name = getattr(self.tokenizer, "name_or_path", "") or "the tokenizer"
            raise ValueError(f"the chat template of {name} does not take these messages: {error}.") from None
        return torch.tensor(self.encode(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)


def _tokenizer_of(model: nn.Module | None) -> Any:
    from transformers import AutoTokenizer

    name = name_or_path(model)
    try:
        if not name:
            raise OSError("the model has no name")
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"calibration texts need a tokenizer, and none was found for the model ({name!r}). Pass tokenizer=, or "
            "token ids instead of texts."
        ) from error


def _refuse_paths(texts: Sequence[str]) -> None:
    """ValueError if all of ``texts`` are names of files: the names would be calibrated on."""
    if all(_is_path(text) for text in texts):
        raise ValueError(
            f"{texts[0]!r} is the path of a file or folder, and would be read as a text of {len(texts[0])} letters. "
            f"To read the file give pathlib.Path({texts[0]!r}), or its text."
        )


def _is_path(text: str) -> bool:
    try:
        return bool(text.strip()) and len(text) < 1000 and Path(text).exists()
    except (OSError, ValueError):  # too long for a name, or with a character that no name has
        return False


def text_of(path: Path) -> str:
    """The text of a file. Raises ValueError where it is none, or not in UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file. Give the path of a text file, texts, token ids, or a dataset.")
    if path.suffix.lower() not in TEXT_SUFFIXES:
        kind = {".jsonl": "json", ".tsv": "csv"}.get(path.suffix.lower(), path.suffix.lower().removeprefix("."))
        raise ValueError(
            f"{path} holds rows and not one text. Load it as a dataset: datasets.load_dataset({kind!r}, "
            f"data_files={str(path)!r})."
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8. Decode it and give the text.") from None
