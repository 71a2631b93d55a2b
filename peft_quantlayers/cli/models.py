"""Loading what a verb is given: models of any class, tokenizers, adapters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..integrations.float_checkpoint import model_class
from ..lora.base_fingerprint import AnotherBaseWarning


def config_of(name: str) -> PreTrainedConfig:
    """The config of a model in a folder or on the Hub. Raises ValueError where the folder holds an adapter."""
    folder = Path(name).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{name} holds an adapter, and a model is needed here. Name the model that it was trained on, and the "
            f"adapter beside it where there is such an option: --adapter {name}."
        )
    return AutoConfig.from_pretrained(name)


def _class_of(config: PreTrainedConfig) -> Any:
    return model_class(config.architectures) or AutoModelForCausalLM


def model_on_meta(name: str) -> PreTrainedModel:
    """The float model that the config of ``name`` describes, without numbers; a quantized one as its files hold it."""
    config = config_of(name)
    if getattr(config, "quantization_config", None) is not None:
        model: Any = load_model(name)
        model.to("meta").tie_weights()  # which moving has taken apart
        return model
    found = _class_of(config)
    with torch.device("meta"):
        model = getattr(found, "from_config", found)(config)
    return model.to(config.dtype or torch.float32)


def load_model(name: str, *, dtype: str = "auto", device: str | None = None, **options: Any) -> PreTrainedModel:
    """A model from a folder or the Hub, as its config describes it.

    Args:
        name: folder, or name on the Hub.
        dtype: of its float weights; "auto" for that of the files.
        device: where to put it, such as "cuda"; None for the CPU.
        options: for ``from_pretrained``.
    """
    refuse_missing_folder("model", name)
    placed = {} if device is None else {"device_map": device}
    return _class_of(config_of(name)).from_pretrained(name, dtype=dtype, **placed, **options).eval()


def base_of(adapter: str) -> str:
    """The name of the model that an adapter was trained on. Raises ValueError where the adapter does not say it."""
    name = _adapter_config(adapter).base_model_name_or_path
    if name is None:
        raise ValueError(f"{adapter} does not name its base model. Name it: --model FOLDER_OR_NAME.")
    return name


def with_adapter(model: PreTrainedModel, adapter: str | None) -> Any:
    """``model`` with the adapter of a folder or of the Hub on it, or as it is without one.

    Raises:
        ValueError: no adapter is there; it was trained on another base.
    """
    if adapter is None:
        return model
    _adapter_config(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AnotherBaseWarning)
        try:
            return PeftModel.from_pretrained(model, adapter).eval()
        except AnotherBaseWarning as error:
            raise ValueError(
                f"{error} If it was quantized for training only, quantize it again as it was there (peft-quantlayers "
                "quantize MODEL base ...), and name that: --model base."
            ) from None


def _adapter_config(adapter: str) -> PeftConfig:
    refuse_missing_folder("adapter", adapter)
    try:
        return PeftConfig.from_pretrained(adapter)
    except ValueError as error:
        raise ValueError(
            f"--adapter {adapter}: {str(error).rstrip('.')}. Give the folder of an adapter, or its name on the Hub."
        ) from None


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder or of a model on the Hub; None where there is none."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return None


def needed_tokenizer(name: str) -> Any:
    """As :func:`load_tokenizer`. Raises FileNotFoundError where there is no such model, ValueError without one."""
    tokenizer = load_tokenizer(name)
    if tokenizer is None and not Path(name).expanduser().exists():
        raise FileNotFoundError(
            f"{name}: there is no such folder here, and the Hub has no tokenizer of that name or cannot be reached."
        )
    if tokenizer is None:
        raise ValueError(f"{name} has no tokenizer, which is needed here. Name one: --tokenizer FOLDER_OR_NAME.")
    return tokenizer


def refuse_missing_folder(option: str, name: str) -> None:
    """Raise FileNotFoundError where ``name`` looks like a path, and nothing is there."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local and not Path(name).expanduser().exists():
        raise FileNotFoundError(f"--{option} {name}: there is no such folder.")
