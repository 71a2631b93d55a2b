"""What safetensors files hold, read from their headers: names, shapes and dtypes, before any tensor is loaded."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..formats import QuantSpec
from ..formats.checkpoint_format import TensorHeader
from ..formats.quant_spec import TensorLayout
from ..layers.dense_types import dense_shape
from ..layers.expert_types import find_stack
from ..methods import registered_methods

_SAFETENSORS_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
# Of each of two tensors that are compared.
_COMPARED_BYTES = 2**24


@dataclass(frozen=True, kw_only=True)
class FileHeader(TensorHeader):
    """A header with the file that it is from, and the name that the file has for the dtype."""

    file: str
    stored_dtype: str

    @property
    def file_name(self) -> str:
        return Path(self.file).name


class CheckpointFiles:
    """The tensors of some safetensors files: all headers, read at once, and single tensors on request.

    Attributes:
        headers: by name of the tensor.
        opened: the files, by path.

    ``backend``: how tensors are read, ``"mmap"`` or ``"pread"``. What was mapped stays in memory.

    Raises:
        ValueError: a file is damaged, or no safetensors file; two files hold a tensor of the same name.
    """

    def __init__(self, files: Iterable[str], *, backend: str = "mmap") -> None:
        self.headers: dict[str, FileHeader] = {}
        self.opened = {file: open_checkpoint(file, backend=backend) for file in files}  # reads the whole header
        for file, opened in self.opened.items():
            for key in opened.keys():  # noqa: SIM118
                if key in self.headers:
                    raise ValueError(
                        f"{Path(file).name} and {self.headers[key].file_name} both hold the tensor {key!r}: they are "
                        "no parts of one checkpoint. Download or save it again."
                    )
                entry = opened.get_slice(key)
                stored_dtype = entry.get_dtype()
                self.headers[key] = FileHeader(
                    shape=tuple(entry.get_shape()),
                    dtype=_SAFETENSORS_DTYPES.get(stored_dtype),
                    file=file,
                    stored_dtype=stored_dtype,
                )

    def __str__(self) -> str:
        """The file, or the first one and how many more."""
        names = [Path(file).name for file in self.opened]
        return ", ".join(names[:1]) + (f" and {len(names) - 1} more" if len(names) > 1 else "")

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU."""
        return self.opened[self.headers[name].file].get_tensor(name)

    def slice(self, name: str) -> Any:
        """The tensor ``name``, not read yet; indexing it reads."""
        return self.opened[self.headers[name].file].get_slice(name)

    def n_bytes(self, name: str) -> int:
        """What the tensor ``name`` takes in the file."""
        header = self.headers[name]
        n_bits = re.search(r"\d+", header.stored_dtype)  # of "BF16", "F8_E4M3"; BOOL has a byte
        return math.prod(header.shape) * (8 if n_bits is None else int(n_bits[0])) // 8

    def are_equal(self, name: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; reads a part of each at a time."""
        first, second = self.headers[name], self.headers[other]
        if first.shape != second.shape or first.stored_dtype != second.stored_dtype:
            return False
        if not first.shape:
            return torch.equal(self.read(name), self.read(other))
        a, b = self.slice(name), self.slice(other)
        step = max(1, _COMPARED_BYTES * first.shape[0] // max(1, self.n_bytes(name)))
        parts = [slice(i, min(i + step, first.shape[0])) for i in range(0, first.shape[0], step)]
        return all(torch.equal(a[part], b[part]) for part in parts)


def open_checkpoint(file: str, *, backend: str = "mmap") -> Any:
    """A safetensors file, opened to read single tensors. Raises ValueError for any other or a damaged file."""
    if not str(file).endswith(".safetensors"):
        raise ValueError(
            f"{Path(file).name}: quantized models are read from safetensors files only, since a pickle may run code. "
            "For a folder that the hqq package wrote (qmodel.pt) use peft_quantlayers.load_hqq_folder."
        )
    if not Path(file).is_file():
        raise ValueError(f"{file} is not there, or no regular file: a pipe or a device is not opened.")
    if not os.access(file, os.R_OK):
        raise PermissionError(f"{file} cannot be read: there is no permission.")
    try:
        return safe_open(file, framework="pt", device="cpu", backend=backend)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}). Download or save it again.") from None


def check_kinds(
    model: nn.Module, names: Mapping[str, str], stacks: Collection[str], embeddings: Collection[str]
) -> None:
    """Raise ValueError where a checkpoint has a stack of experts and the model a linear layer, and so on.

    ``names``: the model's name of each stored name; ``stacks`` and ``embeddings``: the stored names that are such.
    """
    for stored_name, name in names.items():
        stored = "a stack of experts" if stored_name in stacks else "an embedding" if stored_name in embeddings else ""
        wanted = "a stack of experts" if find_stack(model, name) else ""
        if not wanted and isinstance(model.get_submodule(name), nn.Embedding):
            wanted = "an embedding"
        if stored != wanted:
            stored, wanted = stored or "a linear layer", wanted or "a linear layer"
            raise ValueError(
                f"{stored_name}: config.json describes {stored}, and the model has {wanted} there. The two do not "
                "belong together."
            )


def check_headers(
    files: CheckpointFiles,
    parameters: Mapping[str, str],
    specs: Mapping[str, QuantSpec],
    stored_layers: Collection[str],
    tied: Mapping[str, str],
    branches: Collection[str],
    model: nn.Module,
) -> None:
    """Compare names, shapes and dtypes in the files with what ``model`` will hold, before anything is loaded.

    Args:
        files: the checkpoint.
        parameters: the parameter of the model for each name in the files.
        specs: of the layers to be quantized, which are still dense in ``model``.
        stored_layers: layers that are stored in another layout, and were checked when they were described.
        tied: of layers whose tensors may be in the files under the name of another one, that name.
        branches: the layers that have a low-rank branch.
        model: where the tensors go.

    Raises:
        ValueError: a tensor is missing, unexpected, there twice, or of another shape or dtype.
    """
    layouts = {name: spec.layout_of(dense_shape(model, name)) for name, spec in specs.items()}
    codes_names = {method.spec_type.codes_name for method in registered_methods().values()}
    dense = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    found: dict[str, str] = {}
    for key, parameter in parameters.items():
        header, (name, _, tensor_name) = files.headers[key], parameter.rpartition(".")
        if name in stored_layers:
            continue
        if name in specs and tensor_name != "bias":
            if parameter in found:
                raise ValueError(f"{header.file_name} holds {key!r}, which is the same as {found[parameter]!r}.")
            found[parameter] = key
            _check_layer_tensor(key, header, tensor_name, specs[name], layouts[name])
        elif name.removesuffix(".branch") in specs:
            if name not in specs and name.removesuffix(".branch") not in branches:  # else it is a bias
                raise ValueError(
                    f"{header.file_name}: unexpected tensor {key!r}; config.json has no low-rank branch there. The "
                    "file does not belong to it."
                )
            _check_kind(key, header, is_floating=True)
        elif tensor_name in codes_names and parameter not in dense:
            raise ValueError(
                f"{header.file_name} holds the codes {key!r}, and config.json does not say how that layer is "
                "quantized: it would be filled with random numbers. The config is damaged or belongs to another "
                "file."
            )
        elif parameter in dense:
            _check_kind(key, header, is_floating=dense[parameter].is_floating_point())
    layers = [name for name in specs if name not in stored_layers and tied.get(name, name) == name]
    missing = [f"{name}.{tensor}" for name in layers for tensor in layouts[name] if f"{name}.{tensor}" not in found]
    if missing:
        raise ValueError(
            f"{files}: the checkpoint lacks {len(missing)} tensor(s) that its config.json promises, for example "
            f"{missing[:3]}. {_other_names(files, parameters)}Download or save it again."
        )


def _other_names(files: CheckpointFiles, parameters: Mapping[str, str]) -> str:
    """A sentence on tensors in the files that have no place in the model; empty without any."""
    unknown = [key for key in files.headers if key not in parameters]
    if not unknown:
        return ""
    return (
        f"It holds tensors for which the model has no place, for example {unknown[0]!r}; key_mapping does not reach "
        "quantized layers, so rename tensors in the files. "
    )


def _check_layer_tensor(
    key: str, header: FileHeader, tensor_name: str, spec: QuantSpec, layout: Mapping[str, TensorLayout]
) -> None:
    expected = layout.get(tensor_name)
    if expected is None:
        raise ValueError(
            f"{header.file_name}: unexpected tensor {key!r}; a layer stored as {spec} has {sorted(layout)}. The file "
            "does not belong to this config.json."
        )
    if header.shape != expected.shape or header.dtype != expected.dtype:
        raise ValueError(
            f"{header.file_name}: {key!r} is {header.stored_dtype} of shape {header.shape}, and config.json asks "
            f"for {expected.dtype} of shape {expected.shape}. The file does not belong to this config.json, or "
            "is damaged."
        )


def _check_kind(key: str, header: FileHeader, *, is_floating: bool) -> None:
    """Raise ValueError where integers are stored for a floating tensor, or the other way round."""
    if header.stored_dtype.startswith(("F", "BF")) != is_floating:
        raise ValueError(
            f"{header.file_name}: {key!r} is {header.stored_dtype}, and the model has "
            f"{'floating-point numbers' if is_floating else 'integers'} there. The file is damaged, or belongs to "
            "another model."
        )
