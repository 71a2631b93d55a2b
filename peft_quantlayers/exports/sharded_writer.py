"""Writes safetensors files as the tensors come, so that memory holds one tensor at a time.

The header of such a file comes first and tells where each tensor is, so that tensors wait in a file beside it until
all of them are there.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ..formats.quantized_weight import stored_bytes
from ..formats.safetensors_file import StoredTensor, write_safetensors

# Of one file; a larger tensor has a file of its own.
SHARD_BYTES = 1 << 30
# transformers and every engine look for it.
_METADATA = {"format": "pt"}


class ShardedWriter:
    """Tensors of a model on their way to ``model.safetensors``, or to several files and their index.

    Attributes:
        n_bytes: of all tensors so far.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting = folder / "waiting-tensors"
        self._places: dict[str, tuple[StoredTensor, int]] = {}
        self._held = 0
        self._shards: list[list[str]] = []
        self.n_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take ``tensor``."""
        if self._places and self._held + tensor.nbytes > SHARD_BYTES:
            self._flush()
        with self._waiting.open("ab") as opened:
            opened.write(stored_bytes(tensor.detach().contiguous().reshape(-1)))
        self._places[name] = StoredTensor.of(tensor), self._held
        self._held += tensor.nbytes
        self.n_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, name the files, and write the index where there are several."""
        if self._places or not self._shards:
            self._flush()
        n_shards = len(self._shards)
        if n_shards == 1:
            self._file(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._shards):
            file = self._folder / f"model-{index + 1:05d}-of-{n_shards:05d}.safetensors"
            self._file(index).rename(file)
            weight_map |= dict.fromkeys(names, file.name)
        contents = {"metadata": {"total_size": self.n_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(contents, indent=2) + "\n")

    def _flush(self) -> None:
        tensors = {name: stored for name, (stored, _) in self._places.items()}
        write_safetensors(self._file(len(self._shards)), tensors, self._read, metadata=_METADATA)
        self._shards.append(list(self._places))
        self._waiting.unlink(missing_ok=True)
        self._places, self._held = {}, 0

    def _read(self, name: str) -> Tensor:
        stored, offset = self._places[name]
        if not stored.n_bytes:
            return torch.empty(stored.shape, dtype=stored.torch_dtype)
        with self._waiting.open("rb") as opened:
            opened.seek(offset)
            octets = bytearray(opened.read(stored.n_bytes))
        return torch.frombuffer(octets, dtype=stored.torch_dtype).view(stored.shape)

    def _file(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}.safetensors"
