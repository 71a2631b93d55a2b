"""Loads a folder that the ``hqq`` package saved (``AutoHQQHFModel.save_quantized``): config.json and qmodel.pt.

``qmodel.pt`` maps module names to their entries: a quantized layer's as :mod:`..formats.published_hqq` describes
them, any other module's as tensors by parameter name. It is a pickle, of which only tensors and plain values are
read; a folder in the layout of transformers 4 (safetensors) is loaded with ``from_pretrained`` instead.
"""

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..arguments import check_device, check_dtype
from ..formats.checkpoint_format import ModelDescription
from ..formats.checksums import SWITCH, are_checksums_used
from ..formats.published_hqq import StoredHqqLayer, describe_hqq_layer, flattened
from ..layers import QuantizedLinear
from ..layers.dense_types import dense_modules, dense_shape
from ..layers.quantized_layers import quantized_layers
from ..layers.replace import place_empty_layer
from ..methods import spec_from_dict
from .checkpoint_names import CheckpointNames
from .single_experts import stacks_of_layers
from .transformers_quantizer import QuantlayersHfQuantizer

WEIGHTS = "qmodel.pt"


def load_hqq_folder(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """The causal language model that the ``hqq`` package saved in ``folder``, its quantized layers as HQQLinear.

    Experts of a mixture, which the package keeps one by one, become stacks.

    Codes, scales and zeros are those of the file. The model trains, saves and reloads as any quantized one.

    Args:
        folder: holds config.json and qmodel.pt.
        dtype: of all that is not quantized, and the layers' ``compute_dtype``; None for the dtype in the file.
        device: where the model goes; None for the CPU.

    Raises:
        TypeError: ``folder`` is not a path, or ``dtype`` not a floating dtype.
        FileNotFoundError: one of the two files is not there.
        ValueError: qmodel.pt is damaged, asks for code to be run, or does not belong to config.json; names the
            layer at fault.
    """
    if not isinstance(folder, (str, Path)):
        raise TypeError(f"folder must be the path of a folder, got {type(folder).__name__}.")
    check_dtype("dtype", dtype)
    check_device("device", device)
    folder = Path(folder)
    for file in ("config.json", WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file} is not there. A folder of the hqq package has config.json and {WEIGHTS}; a model in "
                "safetensors loads with AutoModelForCausalLM.from_pretrained."
            )
    modules = _read_modules(folder / WEIGHTS)
    floats = {
        f"{name}.{entry}": tensor
        for name, entries in modules.items()
        for entry, tensor in entries.items()
        if isinstance(tensor, Tensor) and ("W_q" not in entries or entry == "bias")
    }
    dtype = dtype or next((tensor.dtype for tensor in floats.values() if tensor.is_floating_point()), torch.float16)
    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights(include_buffers=False):  # rotary tables are computed, not stored
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    stored = {name: flattened(entries, name=name) for name, entries in modules.items() if "W_q" in entries}
    layers = {
        name: describe_hqq_layer(entries, name=name, spec_from_dict=spec_from_dict) for name, entries in stored.items()
    }
    names = CheckpointNames(model)
    description = ModelDescription(specs={name: layer.spec for name, layer in layers.items()}, stored_layers=layers)
    stacks = stacks_of_layers(model, description, names)
    single = {name for stack in stacks.values() for name in stack.stored_names}
    parameters = names.parameters([*floats, *(f"{name}.weight" for name in layers)])
    places = {
        name: parameters.get(f"{name}.weight", name).removesuffix(".weight") for name in layers if name not in single
    }
    _place_layers(model, {places[name]: layer for name, layer in layers.items() if name in places})
    for name, stack in stacks.items():
        place_empty_layer(model, name, stack.spec, compute_dtype=None, device="meta")
    converted = {
        f"{place}.{part}": layers[name].convert(part, stored[name][part])
        for name, place in places.items()
        for part in layers[name].tensor_names
    }
    converted |= {
        f"{name}.{part}": stack.tensor(part, partial(_entry, stored, part))
        for name, stack in stacks.items()
        for part in stack.layout
    }
    dense = {parameters.get(key, key): tensor for key, tensor in floats.items()}
    _load_tensors(model, _cast(dense, dtype) | converted)
    for name, layer in quantized_layers(model).items():
        layer.quantized_weight.check(name)
    if isinstance(model.get_output_embeddings(), QuantizedLinear):
        model.config.tie_word_embeddings = False  # tying would write the embeddings into the codes
    model.tie_weights()
    _check_complete(model)
    model.to(device or "cpu").eval()
    QuantlayersHfQuantizer.attached_to(model)
    return model


def _entry(stored: Mapping[str, Mapping[str, Any]], part: str, name: str) -> Tensor:
    return stored[name][part]


def _read_modules(file: Path) -> dict[str, Mapping[str, Any]]:
    try:
        modules = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} was not read: it is damaged, or it holds more than tensors and plain values, and loading it may "
            f"run code from the file. torch says: {str(error).splitlines()[0]}"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError) as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}). Download or save it again.") from None
    _check_values(file)
    is_mapping = isinstance(modules, Mapping) and all(
        isinstance(name, str) and isinstance(entries, Mapping) for name, entries in modules.items()
    )
    if not is_mapping:
        raise ValueError(f"{file} does not map module names to their tensors: the hqq package did not write it.")
    if not any("W_q" in entries for entries in modules.values()):
        raise ValueError(f"{file} holds no W_q tensor: it is not quantized.")
    return modules


def _check_values(file: Path) -> None:
    """Raise ValueError where the checksums of a zip file, as torch writes it, do not fit; torch.load checks none."""
    if not are_checksums_used() or not zipfile.is_zipfile(file):
        return
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, NotImplementedError) as error:
        raise ValueError(f"{file} is damaged ({error}). Download or save it again.") from None
    if damaged is not None:
        raise ValueError(
            f"{file} is damaged: {damaged} does not have the checksum with which it was saved. Download or save it "
            f"again. If it was edited on purpose, {SWITCH}=1 loads it."
        )


def _place_layers(model: nn.Module, layers: Mapping[str, StoredHqqLayer]) -> None:
    """Quantized layers with empty tensors in the place of the modules that ``layers`` names."""
    linears = dense_modules(model)
    for name, layer in layers.items():
        if name not in linears:
            raise ValueError(
                f"{name}: {WEIGHTS} holds a quantized layer of that name, and the model of config.json has no linear "
                "layer there."
            )
        if layer.shape != dense_shape(model, name):
            raise ValueError(
                f"{name}: the file holds a weight of shape {layer.shape}, the model wants {dense_shape(model, name)}."
            )
        place_empty_layer(model, name, layer.spec, compute_dtype=None, device="meta")


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _load_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put ``tensors`` in the place of the model's parameters and buffers of the same names."""
    expected = model.state_dict()
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name}: the file holds a tensor of shape {tuple(tensor.shape)}, the model wants "
                f"{tuple(expected[name].shape)}. {WEIGHTS} does not belong to this config.json."
            )
    unexpected = model.load_state_dict(tensors, strict=False, assign=True).unexpected_keys
    unexpected = [name for name in unexpected if not name.endswith("rotary_emb.inv_freq")]
    if unexpected:
        raise ValueError(
            f"{WEIGHTS} holds {len(unexpected)} tensor(s) that the model of config.json has no place for, for example "
            f"{unexpected[:3]}."
        )


def _check_complete(model: nn.Module) -> None:
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise ValueError(
            f"{WEIGHTS} lacks {len(missing)} tensor(s) of the model, for example {missing[:3]}. Download or save it "
            "again."
        )
