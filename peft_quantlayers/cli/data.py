"""Texts and datasets that a verb is given by a name: files, folders, names on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.texts import TEXT_SUFFIXES, token_sequences

# Suffixes that the package ``datasets`` reads, and the name of its reader.
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
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
    if path.is_file() and path.suffix in TEXT_SUFFIXES:
        return path
    if not path.exists() and (path.suffix in (*TEXT_SUFFIXES[1:], *READERS) or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"--{option} {name}: there is no such file.")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"--{option} {name} needs the package datasets: pip install datasets.") from None
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    if path.is_file():
        if path.suffix not in READERS:
            raise ValueError(f"--{option} {name}: a file of this kind is not read. Give {DATA_HELP}.")
        try:
            return datasets.load_dataset(READERS[path.suffix], data_files=str(path), split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"--{option} {name} cannot be read as {path.suffix}: {reason}") from None
    dataset, _, split = name.partition(":")
    return datasets.load_dataset(dataset, split=split or "train")


def token_ids(option: str, name: str, tokenizer: Any, *, n_tokens: int) -> Tensor:
    """The first ``n_tokens`` token ids of a text or dataset, (n,) int64.

    Raises:
        ValueError: ``n_tokens`` is below 1; as :func:`load_data`.
    """
    if n_tokens < 1:
        raise ValueError(f"{n_tokens} tokens of --{option} {name} are none: at least 1 is needed.")
    sequences = token_sequences(load_data(option, name), tokenizer, None, n_tokens=n_tokens)
    return torch.cat(sequences)[:n_tokens]
