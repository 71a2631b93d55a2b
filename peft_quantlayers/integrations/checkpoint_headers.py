"""What safetensors files hold, read from their headers: names, shapes and dtypes, before any tensor is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..formats import QuantSpec
from ..formats.checkpoint_format import TensorHeader
from ..layers.dense_types import dense_modules, dense_shape
from ..methods import registered_methods

_SAFETENSORS_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


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

    Raises:
        ValueError: a file is damaged, or no safetensors file.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self.headers: dict[str, FileHeader] = {}
        self.opened = {file: open_checkpoint(file) for file in files}  # opening reads the whole header
        for file, opened in self.opened.items():
            for key in opened.keys():  # noqa: SIM118
                entry = opened.get_slice(key)
                stored_dtype = entry.get_dtype()
                self.headers[key] = FileHeader(
                    shape=tuple(entry.get_shape()),
                    dtype=_SAFETENSORS_DTYPES.get(stored_dtype),
                    file=file,
                    stored_dtype=stored_dtype,
                )

    def read(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU."""
        return self.opened[self.headers[name].file].get_tensor(name)


def open_checkpoint(file: str) -> Any:
    """A safetensors file, opened to read single tensors. Raises ValueError for any other or a damaged file."""
    if not str(file).endswith(".safetensors"):
        raise ValueError(
            f"{Path(file).name}: quantized models are read from safetensors files only, since a pickle may run code. "
            "For a folder that the hqq package wrote (qmodel.pt) use peft_quantlayers.load_hqq_folder."
        )
    if not Path(file).is_file():
        raise ValueError(f"{Path(file).name} is not there, or no regular file: a pipe or a device is not opened.")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{Path(file).name} is damaged or incomplete ({error}). Download or save it again.") from None


def check_headers(headers: Mapping[str, FileHeader], specs: dict[str, QuantSpec], model: nn.Module) -> None:
    """Compare names, shapes and dtypes in the files with what the specs ask for, before anything is loaded.

    Raises:
        ValueError: a tensor is missing, unexpected, or of another shape or dtype.
    """
    layouts = {name: spec.tensor_layout(*dense_shape(model, name)) for name, spec in specs.items()}
    found: dict[str, set[str]] = {name: set() for name in specs}
    linears = dense_modules(model)
    codes_names = {method.spec_type.codes_name for method in registered_methods().values()}
    is_seen = False
    for key, header in headers.items():
        stored_name, _, tensor_name = key.rpartition(".")
        name = model_name(stored_name, specs, model)
        if name is None:
            if tensor_name in codes_names and model_name(stored_name, linears, model) is not None:
                raise ValueError(
                    f"{header.file_name} holds the codes {key!r}, and config.json does not say how that layer is "
                    "quantized: it would be filled with random numbers. The config is damaged or belongs to another "
                    "file."
                )
            continue
        is_seen = True
        if tensor_name == "bias":
            continue
        expected = layouts[name].get(tensor_name)
        if expected is None:
            raise ValueError(
                f"{header.file_name}: unexpected tensor {key!r}; a layer stored as {specs[name]} has "
                f"{sorted(layouts[name])}. The file does not belong to this config.json."
            )
        if header.shape != expected.shape or header.dtype != expected.dtype:
            raise ValueError(
                f"{header.file_name}: {key!r} is {header.stored_dtype} of shape {header.shape}, and config.json asks "
                f"for {expected.dtype} of shape {expected.shape}. The file does not belong to this config.json, or "
                "is damaged."
            )
        found[name].add(tensor_name)
    if not is_seen:
        return  # names are converted while loading; the loaded tensors are checked instead
    missing = [f"{name}.{tensor}" for name in specs for tensor in layouts[name] if tensor not in found[name]]
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensor(s) that its config.json promises, for example "
            f"{missing[:3]}. Download or save it again."
        )


def model_name(stored_name: str, names: Any, model: nn.Module) -> str | None:
    """The module that a name in a file means: the base model's prefix may be there or not."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    for candidate in (stored_name, stored_name.removeprefix(prefix), prefix + stored_name):
        if candidate in names:
            return candidate
    return None


def names_in_model(stored_names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """The module of ``model`` that each stored name of a quantized layer means.

    Raises:
        ValueError: the model has no dense layer of that name.
    """
    linears = dense_modules(model)
    is_headless = getattr(model, "base_model", model) is model
    names = {}
    for stored_name in stored_names:
        name = model_name(stored_name, linears, model)
        if name is not None:
            names[stored_name] = name
        elif ".experts." in stored_name:
            raise ValueError(
                f"{stored_name}: transformers 5 keeps the experts of a layer in one tensor, for which the codes of "
                "single experts cannot stand. Such mixture-of-experts checkpoints need transformers 4."
            )
        elif not is_headless:  # AutoModel on a checkpoint with a head: the head is not in this model
            raise ValueError(
                f"the checkpoint has a quantized module {stored_name!r}, and the model has no linear layer of that "
                "name. The two do not belong together."
            )
    if not names:
        raise ValueError("the checkpoint has quantized modules, and the model has none of them.")
    return names
