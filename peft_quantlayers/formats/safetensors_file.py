"""Write a safetensors file tensor by tensor, with the same bytes whenever the tensors are the same.

The safetensors package takes all tensors of a file at once, and writes the entries of the metadata in an order that
changes from run to run. The format: the length of a JSON header, the header, and the tensors one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .quantized_weight import stored_bytes

# Each dtype's name in the header, in the order in which the safetensors package writes tensors, last to first.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
_NAMES = {name: dtype for dtype, name in DTYPES.items()}
_ORDER = list(DTYPES.values())
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """Name of the dtype in a file, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> StoredTensor:
        return cls(DTYPES[tensor.dtype], tuple(tensor.shape))

    @property
    def torch_dtype(self) -> torch.dtype:
        return _NAMES[self.dtype]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def write_safetensors(
    file: Path,
    tensors: Mapping[str, StoredTensor],
    read: Callable[[str], Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``tensors`` to ``file``; each is asked for by ``read``, once, and may be dropped then.

    Raises:
        OSError: no space, no permission.
        ValueError: ``read`` gives a tensor of another dtype or shape than announced.
    """
    names = sorted(tensors, key=lambda name: (-_ORDER.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].n_bytes
        entry = tensors[name]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little"))
        opened.write(text)
        for name in names:
            tensor = read(name)
            if StoredTensor.of(tensor) != tensors[name]:
                raise ValueError(f"{name}: expected {tensors[name]}, got {StoredTensor.of(tensor)}.")
            opened.write(stored_bytes(tensor.reshape(-1)))
