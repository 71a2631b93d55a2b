"""What safetensors files hold, read from their headers: names, shapes and dtypes, before any tensor is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..formats import QuantSpec
from ..layers.dense_types import dense_modules, dense_shape
from ..methods import registered_methods

_SAFETENSORS_DTYPES = {
    "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip


def header_dtypes(files: Iterable[str]) -> dict[str, torch.dtype | None]:
    """Names of all tensors in the files with their dtypes; None for a dtype that no layer of ours has."""
    dtypes = {}
    for file in files:
        with open_checkpoint(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                dtypes[key] = _SAFETENSORS_DTYPES.get(opened.get_slice(key).get_dtype())
    return dtypes


def open_checkpoint(file: str) -> Any:
    """A safetensors file, opened to read single tensors. Raises ValueError for any other or a damaged file."""
    if not str(file).endswith(".safetensors"):
        raise ValueError(
            f"{Path(file).name}: quantized models are read from safetensors files only, since a pickle may run code. "
            "For a folder that the hqq package wrote (qmodel.pt) use peft_quantlayers.load_hqq_folder."
        )
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{Path(file).name} is damaged or incomplete ({error}). Download or save it again.") from None


def check_headers(files: Iterable[str], specs: dict[str, QuantSpec], model: nn.Module) -> None:
    """Compare names, shapes and dtypes in the files with what the specs ask for, before anything is loaded."""
    layouts = {name: spec.tensor_layout(*dense_shape(model, name)) for name, spec in specs.items()}
    found: dict[str, set[str]] = {name: set() for name in specs}
    linears = dense_modules(model)
    codes_names = {method.spec_type.codes_name for method in registered_methods().values()}
    is_seen = False
    for file in files:
        with open_checkpoint(file) as opened:
            for key in opened.keys():  # noqa: SIM118
                stored_name, _, tensor_name = key.rpartition(".")
                name = model_name(stored_name, specs, model)
                if name is None:
                    if tensor_name in codes_names and model_name(stored_name, linears, model) is not None:
                        raise ValueError(
                            f"{Path(file).name} holds the codes {key!r}, and config.json does not say how that layer "
                            "is quantized: it would be filled with random numbers. The config is damaged or belongs "
                            "to another file."
                        )
                    continue
                is_seen = True
                if tensor_name == "bias":
                    continue
                expected = layouts[name].get(tensor_name)
                if expected is None:
                    raise ValueError(
                        f"{Path(file).name}: unexpected tensor {key!r}; a layer stored as {specs[name]} has "
                        f"{sorted(layouts[name])}. The file does not belong to this config.json."
                    )
                entry = opened.get_slice(key)
                shape, dtype = tuple(entry.get_shape()), _SAFETENSORS_DTYPES.get(entry.get_dtype())
                if shape != expected.shape or dtype != expected.dtype:
                    raise ValueError(
                        f"{Path(file).name}: {key!r} is {entry.get_dtype()} of shape {shape}, and config.json asks "
                        f"for {expected.dtype} of shape {expected.shape}. The file does not belong to this "
                        "config.json, or is damaged."
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


def rename_to_model(specs: dict[str, QuantSpec], model: nn.Module) -> dict[str, QuantSpec]:
    """``specs`` by the module names of ``model``.

    Raises:
        ValueError: a module is not in the model, is no linear layer, or its shape does not fit its spec.
    """
    linears = dense_modules(model)
    is_headless = getattr(model, "base_model", model) is model
    renamed = {}
    for stored_name, spec in specs.items():
        name = model_name(stored_name, linears, model)
        if name is None:
            if is_headless:  # AutoModel on a checkpoint with a head: the head is not in this model
                continue
            raise ValueError(
                f"config.json names a quantized module {stored_name!r}, and the model has no linear layer of that "
                "name. The config does not belong to this model."
            )
        try:
            spec.tensor_layout(*dense_shape(model, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        renamed[name] = spec
    if not renamed:
        raise ValueError("config.json names quantized modules, and the model has none of them.")
    return renamed
