"""One checksum per tensor, kept in the header of the safetensors files that hold the tensors.

Every file of a model has the checksums of the whole model under one key of its metadata, which other readers ignore.
So damaged bytes, swapped or relabelled tensors, missing tensors, and files of two different saves are found. Knows
files only through :class:`ChecksumSource`; the checks return what they find and raise nothing.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from .quantized_weight import stored_bytes

METADATA_KEY = "quantlayers_checksums"
SWITCH = "PEFT_QUANTLAYERS_NO_CHECKSUMS"
"""Environment variable; if set, checksums are neither written nor checked."""


@dataclass(frozen=True)
class DamagedTensor:
    """A tensor that is not what was saved.

    Fields:
        name: of the tensor; empty where a whole file is at fault.
        file: name of the file; empty where no file has the tensor.
        reason: as the end of a sentence.
    """

    name: str
    file: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.name, self.reason) if part)


class ChecksumSource(Protocol):
    """A safetensors file, open for reading."""

    def keys(self) -> Iterable[str]: ...
    def metadata(self) -> Mapping[str, str] | None: ...
    def get_tensor(self, name: str) -> Tensor: ...


def are_checksums_used() -> bool:
    """Whether checksums are written and checked; the environment can switch them off."""
    return os.environ.get(SWITCH, "") in ("", "0")


def checksum(tensor: Tensor) -> str:
    """CRC-32 of dtype, shape and the bytes row by row, as 8 hexadecimal digits. Of any dtype and dimension."""
    tensor = tensor.detach()
    start = zlib.crc32(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    return f"{zlib.crc32(stored_bytes(tensor.reshape(-1)), start):08x}"


def checksums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """:func:`checksum` of each tensor, on as many threads as torch uses."""
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        return dict(zip(tensors, pool.map(checksum, tensors.values()), strict=True))


def to_metadata(*variants: Mapping[str, str]) -> dict[str, str]:
    """Metadata of a file. Each variant has all checksums of the model; they differ where names may."""
    distinct = [dict(variant) for i, variant in enumerate(variants) if variant and variant not in variants[:i]]
    return {METADATA_KEY: json.dumps(distinct)} if distinct else {}


def has_checksums(files: Mapping[str, ChecksumSource]) -> bool:
    """Whether any of the files, by path, carries checksums."""
    return any(METADATA_KEY in (file.metadata() or {}) for file in files.values())


def find_damage(files: Mapping[str, ChecksumSource]) -> list[DamagedTensor]:
    """What in the files of one model, by path, is not as it was saved. Reads every byte; [] without checksums."""
    files = {Path(path).name: file for path, file in files.items()}
    stored = {name: (file.metadata() or {}).get(METADATA_KEY) for name, file in files.items()}
    if not any(stored.values()):
        return []
    texts = list(stored.values())
    usual = max(texts, key=texts.count)
    strangers = [name for name, text in stored.items() if text != usual]
    if strangers:
        reason = "belongs to another save than the other files of this model"
        return [DamagedTensor("", name, reason) for name in strangers]
    variants = _variants(usual)
    if not variants:
        return [DamagedTensor("", name, "the checksums in its header are damaged") for name in files]
    found = [(key, name) for name, file in files.items() for key in file.keys()]  # noqa: SIM118
    file_of = dict(found)
    expected = max(variants, key=lambda variant: len(variant.keys() & file_of.keys()))
    damage = [DamagedTensor(key, "", "is missing") for key in expected if key not in file_of]
    damage += [DamagedTensor(key, name, "was not saved with this model") for key, name in found if key not in expected]
    damage += [DamagedTensor(key, name, "is in another file too") for key, name in found if file_of[key] != name]

    def is_damaged(key: str) -> bool:
        return checksum(files[file_of[key]].get_tensor(key)) != expected[key]

    keys = [key for key in file_of if key in expected]
    with ThreadPoolExecutor(max_workers=max(1, torch.get_num_threads())) as pool:
        is_bad = dict(zip(keys, pool.map(is_damaged, keys), strict=True))
    reason = "does not have the checksum with which it was saved"
    return damage + [DamagedTensor(key, file_of[key], reason) for key in keys if is_bad[key]]


def _variants(text: str | None) -> Sequence[dict[str, str]]:
    """What :func:`to_metadata` wrote; () for anything else."""
    try:
        variants = json.loads(text or "")
    except ValueError:
        return ()
    is_right = isinstance(variants, list) and all(
        isinstance(variant, dict) and all(isinstance(value, str) for value in variant.values()) for variant in variants
    )
    return variants if is_right else ()
