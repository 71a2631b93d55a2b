"""Writes safetensors files as the tensors come, so that memory holds one file's worth at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

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
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self.n_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take ``tensor``, which is not changed any more."""
        held = sum(each.nbytes for each in self._pending.values())
        if self._pending and held + tensor.nbytes > SHARD_BYTES:
            self._flush()
        self._pending[name] = tensor.detach().contiguous()
        self.n_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, name the files, and write the index where there are several."""
        if self._pending or not self._shards:
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
        save_file(self._pending, self._file(len(self._shards)), metadata=_METADATA)
        self._shards.append(list(self._pending))
        self._pending = {}

    def _file(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}.safetensors"
