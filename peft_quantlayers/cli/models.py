"""Loading what a verb is given: models of any class, and adapters."""

from __future__ import annotations

import json
import os
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from quantlayers_cli.option_names import WrongUsage
from quantlayers_cli.options import PROGRAM

from ..arguments import check_device
from ..formats import QuantSpec
from ..integrations.float_checkpoint import model_class
from ..integrations.private_transformers import name_or_path
from ..integrations.saved_folder import weight_files
from ..lora.base_fingerprint import AnotherBaseWarning
from ..methods import registered_methods, spec_from_dict
from ..streaming.work_folder import HIDDEN
from .given_exports import export_refused, refuse_export
from .refused_values import values_refused

# What may stand in the place of a device: ways to share a model among all of them.
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
# Of these, transformers needs one in a config to load a quantized model; those of other engines have none.
NAMES_OF_METHODS = {"quant_method", "load_in_8bit", "load_in_4bit"}
OWN_BASE = "base"
"""In the folder of an adapter that was trained on a float model: the model that was made of that, quantized."""


def config_of(name: str) -> PreTrainedConfig:
    """The config of a model in a folder or on the Hub.

    Raises:
        ValueError: the folder holds an adapter, or an export for another engine.
        FileNotFoundError: it holds neither, or there is none and the Hub does not have it.
        NotADirectoryError: it is a file.
    """
    if is_adapter(name):
        base = base_of(name)
        raise ValueError(
            f"{name} holds an adapter, and a model is needed here. Name the one that it was trained on, {base}; or "
            f"make one model of both: {PROGRAM} merge {name} MERGED."
        )
    folder = Path(name).expanduser()
    is_file = (folder / "config.json").is_file()
    refuse_export(name)
    if folder.is_file():
        raise NotADirectoryError(f"{name} is a file. Name the folder of a model.")
    if not is_file and (folder / HIDDEN).is_dir():
        raise FileNotFoundError(
            f"{name} holds no model yet: what quantizes into it is not finished. After an interruption the same "
            "command goes on."
        )
    if folder.exists() and not is_file:
        raise FileNotFoundError(f"{name} holds no model: there is no config.json in it.")
    try:
        config = AutoConfig.from_pretrained(name)
    except OSError:
        if folder.exists():
            raise
        raise FileNotFoundError(
            f"{name}: there is no such folder here, and the Hub has no model of that name or cannot be reached."
        ) from None
    except Exception as error:  # of any kind, from the class of whatever model the file names
        raise ValueError(f"{name}: its config.json describes no model that can be read here ({error}).") from None
    quantization = getattr(config, "quantization_config", None)
    if isinstance(quantization, dict) and not NAMES_OF_METHODS & {*quantization}:
        raise export_refused(name)
    return config


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter and no model."""
    folder = Path(name).expanduser()
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def model_and_adapter(model: str | None, adapter: str | None) -> tuple[str, str | None]:
    """The names of what to load. An adapter's folder in the place of a model stands for its base and itself.

    Raises:
        WrongUsage: neither is given.
        ValueError: the adapter does not name its base.
        FileNotFoundError: one of them is not there.
    """
    refuse_missing_folder("adapter", adapter or "")
    if model is not None and adapter is None and is_adapter(model):
        model, adapter = None, model
    if model is not None:
        if Path(model).expanduser().exists():
            config_of(model)
        return model, adapter
    if adapter is None:
        raise WrongUsage("name a model, or an adapter: --adapter FOLDER.")
    return base_of(adapter), adapter


def is_quantized_already(name: str) -> bool:
    """Whether a model's config says so."""
    return getattr(config_of(name), "quantization_config", None) is not None


def specs_of(name: str) -> list[QuantSpec]:
    """The specs that layers of a quantized model have, by its config alone; of another program's the method's own."""
    fields = getattr(config_of(name), "quantization_config", None) or {}
    fields = fields if isinstance(fields, dict) else fields.to_dict()
    method = registered_methods().get(fields.get("quant_method", ""))
    own = [spec_from_dict(spec) for spec in fields.get("specs", ()) if isinstance(spec, dict)]
    return own or ([] if method is None else [method.spec_type()])


def _class_of(config: PreTrainedConfig) -> Any:
    return model_class(config.architectures) or AutoModelForCausalLM


def model_on_meta(name: str) -> PreTrainedModel:
    """The float model that the config of ``name`` describes, without numbers; a quantized one as its files hold it."""
    if getattr(config_of(name), "quantization_config", None) is not None:
        model: Any = load_model(name)
        model.to("meta").tie_weights()  # which moving has taken apart
        return model
    return _dense_on_meta(name)


def _dense_on_meta(name: str) -> PreTrainedModel:
    config = config_of(name)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    found = _class_of(config)
    try:
        with torch.device("meta"):
            model: Any = getattr(found, "from_config", found)(config)
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: no model can be made as its config.json says ({error}).") from None
    return model.to(config.dtype or torch.float32)


def weight_bytes(name: str) -> int:
    """Of the weights of a model, by its files; of one on the Hub, which may not be here yet, by its config."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        return sum(file.stat().st_size for file in weight_files(folder) if file.is_file())
    return sum(parameter.nbytes for parameter in _dense_on_meta(name).parameters())


def n_parameters(name: str) -> int:
    """Of the float model that the config of ``name`` describes, quantized or not."""
    return sum(parameter.numel() for parameter in _dense_on_meta(name).parameters())


def load_model(
    name: str, *, dtype: str = "auto", device: str | None = None, option: str = "model", **options: Any
) -> PreTrainedModel:
    """A model from a folder or the Hub, as its config describes it.

    Args:
        name: folder, or name on the Hub.
        dtype: of its float weights; "auto" for that of the files.
        device: where to put it, such as "cuda"; None for the CPU.
        option: that names it, for errors.
        options: for ``from_pretrained``.

    Raises:
        FileNotFoundError: a folder that is not there, or holds no model.
        ValueError: an adapter; a device that this machine does not have.
    """
    refuse_missing_folder(option, name)
    check_computing_device(device)
    _check_weights_are_read(name)
    placed = {} if device is None else {"device_map": device}
    try:
        return _class_of(config_of(name)).from_pretrained(name, dtype=dtype, **placed, **options).eval()
    except SafetensorError as error:
        raise ValueError(
            f"{name}: its weights are damaged or incomplete ({error}). Copy or download them again."
        ) from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{name}: its weights have other shapes than its config.json asks for: they do not belong together. Copy "
            "or download them again."
        ) from None


def _check_weights_are_read(name: str) -> None:
    """Raise FileNotFoundError for a file of weights that is missing, PermissionError for one that may not be read."""
    folder = Path(name).expanduser()
    try:
        files = weight_files(folder)
    except (FileNotFoundError, ValueError):  # which loading tells
        return
    for file in files:
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing, which the index of the model names. Copy or download it again."
            )
        if file.is_file():
            check_readable(file)


def check_readable(file: Path) -> None:
    """Raise PermissionError where ``file`` may not be read."""
    if not os.access(file, os.R_OK):
        raise PermissionError(f"{file} cannot be read: there is no permission.")


def check_computing_device(device: str | None) -> None:
    """Raise ValueError for a device that this machine does not have, WrongUsage for what is none that computes."""
    if device in DEVICE_MAPS:
        return
    try:
        is_meta = device is not None and torch.device(device).type == "meta"
    except RuntimeError:  # no machine has it
        with values_refused():
            check_device("device", device)
    check_device("device", device)
    if is_meta:
        raise WrongUsage(f"device={device!r} computes nothing. Name one such as cuda, or leave it out.")


def base_of(adapter: str) -> str:
    """The name of the model that an adapter was trained on; of one of its own, wherever both have been moved to.

    Raises:
        ValueError: the adapter does not say it.
        FileNotFoundError: it is a folder that is not there.
    """
    name, folder = adapter_config(adapter).base_model_name_or_path, Path(adapter).expanduser()
    way_out = "Name its base: --model FOLDER_OR_NAME."
    if name is None:
        raise ValueError(f"{adapter} does not name the model that it was trained on. {way_out}")
    for own in (folder / OWN_BASE, folder.parent / OWN_BASE):  # of a checkpoint, which lies in the adapter's folder
        if Path(name).name == OWN_BASE and (own / "config.json").is_file():
            return str(own)
    if _looks_local(name) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"{adapter} was trained on {name}, which is not there. {way_out}")
    return name


def with_adapter(model: PreTrainedModel, adapter: str | None, *, is_trainable: bool = False) -> Any:
    """``model`` with the adapter of a folder or of the Hub on it, or as it is without one; for inference or training.

    Raises:
        ValueError: no adapter is there; it was trained on another base.
    """
    if adapter is None:
        return model
    adapter_config(adapter)
    try:
        with another_base_refused():
            return PeftModel.from_pretrained(model, adapter, is_trainable=is_trainable).train(is_trainable)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if (isinstance(error, ValueError) and adapter in str(error)) or "was trained on" in str(error):
            raise
        reason = textwrap.shorten(" ".join(str(error).split("\n\t")[:2]), 200, placeholder=" ...")  # of long lists
        raise ValueError(
            f"--adapter {adapter} does not fit {name_of(model)} ({type(model).__name__}): it {_trained_on(adapter)}. "
            f"Give its own base, or an adapter of this model. {reason}"
        ) from None


def _trained_on(adapter: str) -> str:
    """The end of a sentence: the name of an adapter's base, and its architecture if that can be read."""
    try:
        base = base_of(adapter)
        kind = ", ".join(config_of(base).architectures or ())
    except (OSError, ValueError):
        named = adapter_config(adapter).base_model_name_or_path
        return "does not name its base" if named is None else f"was trained on {named}, which is not there"
    return f"was trained on {base}" + (f" ({kind})" if kind else "")


def name_of(model: PreTrainedModel) -> str:
    return name_or_path(model) or type(model).__name__


@contextmanager
def another_base_refused() -> Iterator[None]:
    """While this is open, an adapter that meets a base that it was not trained on is a ValueError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnotherBaseWarning)
        try:
            yield
        except AnotherBaseWarning as error:
            raise ValueError(
                f"{error} If it was quantized for training only, quantize it again as it was there (peft-quantlayers "
                "quantize MODEL base ...), and name that: --model base."
            ) from None


def adapter_config(adapter: str) -> PeftConfig:
    """The config of an adapter in a folder or on the Hub.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no weights.
        ValueError: it holds no adapter, or a damaged one.
    """
    refuse_missing_folder("adapter", adapter)
    folder = Path(adapter).expanduser()
    if is_adapter(adapter) and not any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)):
        raise FileNotFoundError(f"--adapter {adapter} holds no {SAFETENSORS_WEIGHTS_NAME}: copy or download it again.")
    try:
        config = PeftConfig.from_pretrained(adapter)
    except json.JSONDecodeError as error:
        raise ValueError(f"--adapter {adapter}: its adapter_config.json is damaged ({error}).") from None
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"--adapter {adapter}: its adapter_config.json is no config of an adapter ({error})."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"--adapter {adapter}: {str(error).rstrip('.')}. Give the folder of an adapter, or its name on the Hub."
        ) from None
    rank, base = getattr(config, "r", 1), config.base_model_name_or_path
    if not isinstance(rank, int | None) or not isinstance(base, str | None):
        wrong = f"r={rank!r}" if not isinstance(rank, int) else f"base_model_name_or_path={base!r}"
        raise ValueError(f"--adapter {adapter}: its adapter_config.json says {wrong}, which no adapter can have.")
    return config


def rank_of(adapter: str) -> int:
    """Of a LoRA adapter; 0 of another kind."""
    return getattr(adapter_config(adapter), "r", None) or 0


def refuse_missing_folder(option: str, name: str) -> None:
    """Raise FileNotFoundError where ``name`` looks like a path, and nothing is there."""
    if _looks_local(name) and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"--{option} {name}: there is no such folder.")


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
