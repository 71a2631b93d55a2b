"""Texts and datasets that a verb is given by a name: files, folders, names on the Hub."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantlayers_cli.option_names import WrongUsage

from ..calibration.texts import COLUMNS, TEXT_SUFFIXES, token_sequences
from ..storage import says_full
from .row_forms import joined
from .rows import begins_with_null, check_texts, first_wrong_line

# Columns that make one text together.
JOINED = (
    *(("prompt", "completion"), ("instruction", "input", "output")),
    *(("prompt", "chosen"), ("instruction", "input", "chosen"), ("chosen",)),
)
# Suffixes that the package ``datasets`` reads, and the name of its reader.
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
# Characters in the name of a file that the package datasets does not take as they are.
_READ_OTHERWISE = re.compile(r"[*?\[\]{}$:!\\]")
DATA_HELP = (
    "a text file, a file of rows (.jsonl, .json, .csv, .parquet), a folder written by datasets' save_to_disk, or the "
    "name of a dataset on the Hub, with :SPLIT where it is not 'train'"
)


def load_data(option: str, name: str) -> Any:
    """A text file's path, or a dataset.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package ``datasets`` is needed and not installed.
        ValueError: the file is empty, or cannot be read as what its name says.
    """
    path = Path(name).expanduser()
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"--{option} {name} is empty.")
    if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES:
        return path
    if not path.exists() and is_data_name(name):
        raise FileNotFoundError(f"--{option} {name}: there is no such file.")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"--{option} {name} needs the package datasets: pip install datasets.") from None
    if path.is_file() and path.suffix.lower() not in READERS:
        raise ValueError(f"--{option} {name}: a file of this kind is not read. Give {DATA_HELP}.")
    if path.is_file() and READERS[path.suffix.lower()] == "json" and begins_with_null(path):  # it ends the process
        raise ValueError(f"--{option} {name} cannot be read as {path.suffix}: {first_wrong_line(path)}.")
    try:
        if path.is_dir():
            return datasets.load_from_disk(str(path))
        if path.is_file():
            with _plain_name(path) as file:
                return datasets.load_dataset(READERS[path.suffix.lower()], data_files=file, split="train")
        dataset, _, split = name.partition(":")
        return datasets.load_dataset(dataset, split=split or "train")
    except Exception as error:  # of any kind: readers of a dozen formats, and the Hub
        if says_full(error):
            raise
        raise ValueError(f"--{option} {name} cannot be read{_reason(error, path)}") from None


@contextmanager
def _plain_name(path: Path) -> Iterator[str]:
    """A name of ``path`` in which the package datasets sees no pattern of files, variable or protocol."""
    if not _READ_OTHERWISE.search(str(path)):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / f"rows{path.suffix}"
        link.symlink_to(path.absolute())
        yield str(link)


def is_data_name(name: str) -> bool:
    """Whether ``name`` is a path that is there, or looks like one; otherwise it is a name on the Hub, or a text."""
    try:
        path = Path(name).expanduser()
        is_there = path.exists()
    except (OSError, RuntimeError):  # a text, too long for a name
        return False
    if not is_there and any(above.is_file() for above in path.parents):  # a file below a file
        return True
    return is_there or path.suffix.lower() in (*TEXT_SUFFIXES[1:], *READERS) or name.startswith((".", "/", "~"))


def _reason(error: Exception, path: Path) -> str:
    """The end of a sentence: what is wrong with data, by line where it has lines."""
    if path.is_dir():
        return f": it is no folder that datasets' save_to_disk wrote ({_in_one_line(error)})."
    if not path.is_file():
        return f": it is no file here, and as a dataset of the Hub it says: {_in_one_line(error)}"
    wrong = None
    if "corresponds to no data" in str(error):
        return ": it holds no rows."
    if path.suffix.lower() in (".json", ".jsonl") and os.access(path, os.R_OK):
        wrong = first_wrong_line(path)
    return f" as {path.suffix}: {wrong or _in_one_line(error.__cause__ or error)}."


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".!") or type(error).__name__


def load_texts(option: str, name: str) -> Any:
    """As :func:`load_data`, of texts or chats; rows of prompt and completion, or instruction and output, are joined.

    Raises:
        ValueError: columns that no form has; a row that holds neither text nor a chat, with its line.
    """
    data = load_data(option, name)
    columns = getattr(data, "column_names", None)
    if not isinstance(columns, list) or "input_ids" in columns:
        return data
    parts = next((form for form in JOINED if {form[0], form[-1]} <= {*columns}), ())
    found = [column for column in COLUMNS if column in columns][:1]
    if not (found or parts):
        raise ValueError(
            f"--{option} {name} has the columns {sorted(columns)}. Rows hold text, messages or conversations, prompt "
            "and completion, or instruction and output."
        )
    check_texts(option, name, data, found or [part for part in parts if part in columns and part != "input"])
    return data if found else data.map(joined, remove_columns=columns)


def token_ids(option: str, name: str, tokenizer: Any, *, n_tokens: int) -> Tensor:
    """The first ``n_tokens`` token ids of a text or dataset, (n,) int64.

    Raises:
        WrongUsage: ``n_tokens`` is below 1.
        ValueError: as :func:`load_texts`.
    """
    if n_tokens < 1:
        raise WrongUsage(f"{n_tokens} tokens of --{option} {name} are none: at least 1 is needed.")
    sequences = token_sequences(load_texts(option, name), tokenizer, None, n_tokens=n_tokens)
    if not any(map(len, sequences)):
        raise ValueError(f"--{option} {name} holds no text.")
    return torch.cat(sequences)[:n_tokens]
