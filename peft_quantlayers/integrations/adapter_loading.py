"""Loading and saving adapters on quantized layers, around PEFT's and transformers' own methods.

Each function takes the method that it stands in for, bound, as ``original``. On a model without quantized layers it
calls that and nothing else. A refused adapter leaves the model as it was.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from ..layers.codes_parameter import gathered, is_sharded
from ..layers.quantized_storage import QuantizedStorage
from ..lora import MergeAwareLoraConfig
from ..lora.merge_aware_config import base_record
from .adapter_files import add_checksums, cached_file, check_file, check_folder, check_loaded
from .unchanged_model import unchanged_after_error


def from_pretrained(original: Callable[..., Any], model: nn.Module, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """``PeftModel.from_pretrained``: the files are checked before PEFT adds the adapter to ``model``."""
    if not _is_quantized(model) or not isinstance(model_id, str | os.PathLike):
        return original(model, model_id, *args, **kwargs)
    call = inspect.signature(original).bind(model, model_id, *args, **kwargs)
    check_folder(model_id, kwargs.get("subfolder"), with_config=call.arguments.get("config") is None)
    with _refusing(model, model_id):
        return original(model, model_id, *args, **kwargs)


def load_adapter(
    original: Callable[..., Any], peft_model: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    """``PeftModel.load_adapter``: files that are damaged or do not fit their config are errors."""
    if not _is_quantized(peft_model) or not isinstance(model_id, str | os.PathLike):
        return original(model_id, adapter_name, *args, **kwargs)
    is_new = adapter_name not in peft_model.peft_config
    file = check_folder(model_id, kwargs.get("subfolder"), with_config=is_new)
    with _refusing(peft_model, file or model_id, adapter=None if is_new else adapter_name):
        result = original(model_id, adapter_name, *args, **kwargs)
        _check_loaded(peft_model, adapter_name, result, file, model_id, kwargs)
    return result


def load_into_transformers(
    original: Callable[..., Any],
    model: Any,
    peft_model_id: Any = None,
    adapter_name: str | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """``load_adapter`` of a transformers model, with the checks of :func:`load_adapter`."""
    if not _is_quantized(model) or not isinstance(peft_model_id, str | os.PathLike):
        return original(peft_model_id, adapter_name, *args, **kwargs)
    options = kwargs.get("adapter_kwargs") or {}
    name = "default" if adapter_name is None else adapter_name
    is_new = name not in getattr(model, "peft_config", {})
    file = check_folder(peft_model_id, options.get("subfolder"), with_config=kwargs.get("peft_config") is None)
    with _refusing(model, file or peft_model_id, adapter=None if is_new else name):
        result = original(peft_model_id, adapter_name, *args, **kwargs)
        _check_loaded(model, name, result, file, peft_model_id, options)
    return result


def load_peft_weights(original: Callable[..., Any], model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """PEFT's, where it loads a file without :func:`load_adapter`: only its checksums tell that it is of our layers."""
    if isinstance(model_id, str | os.PathLike):
        file = Path(model_id, kwargs.get("subfolder") or "", SAFETENSORS_WEIGHTS_NAME)
        if file.is_file():
            check_file(file)
    return original(model_id, *args, **kwargs)


def save_pretrained(original: Callable[..., None], peft_model: Any, *args: Any, **kwargs: Any) -> None:
    """``PeftModel.save_pretrained``: the header of each file gets the checksums of its tensors.

    An adapter that accelerate's FSDP2 has sharded is gathered first: all processes must call this.
    """
    call = inspect.signature(original).bind(*args, **kwargs)
    call.apply_defaults()
    names = call.arguments["selected_adapters"] or list(peft_model.peft_config)
    if call.arguments["kwargs"].get("state_dict") is None and any(map(is_sharded, peft_model.parameters())):
        kwargs["state_dict"] = _gathered_state(peft_model, names)
    original(*args, **kwargs)
    if call.arguments["is_main_process"] and _is_quantized(peft_model):
        for name in names:
            folder = Path(call.arguments["save_directory"], "" if name == "default" else name)
            add_checksums(folder / SAFETENSORS_WEIGHTS_NAME)


def config_from_pretrained(
    original: Callable[..., Any], model_id: Any, subfolder: str | None = None, **kwargs: Any
) -> Any:
    """``PeftConfig.from_pretrained``: with the record of the quantized base, which lies beside the config."""
    config = original(model_id, subfolder=subfolder, **kwargs)
    if isinstance(config, MergeAwareLoraConfig) and config.quantized_base is None:
        config.quantized_base = base_record(model_id, subfolder)
    return config


def _gathered_state(peft_model: Any, adapters: Iterable[str]) -> dict[str, Any]:
    """The model's tensors by name; whole are those that PEFT saves of ``adapters``, and those that are not sharded."""
    state = peft_model.state_dict()
    saved = [
        tensor
        for name in adapters
        for tensor in get_peft_model_state_dict(peft_model, state_dict=state, adapter_name=name).values()
    ]
    wanted = set(map(id, saved))
    return {
        name: gathered(tensor).cpu() if is_sharded(tensor) and id(tensor) in wanted else tensor
        for name, tensor in state.items()
    }


def _is_quantized(model: Any) -> bool:
    return isinstance(model, nn.Module) and any(isinstance(module, QuantizedStorage) for module in model.modules())


def _check_loaded(
    model: Any, adapter: str, result: Any, file: Path | None, model_id: Any, options: dict[str, Any]
) -> None:
    if file is None and not Path(model_id).is_dir():
        file = cached_file(model_id, **options)
        if file is not None:
            check_file(file)
    check_loaded(model, model.peft_config[adapter], adapter, result, file or model_id)


@contextmanager
def _refusing(model: nn.Module, source: Any, *, adapter: str | None = None) -> Iterator[None]:
    """An error leaves ``model`` as it was, and says what was being loaded."""
    try:
        with unchanged_after_error(model, adapter=adapter):
            yield
    except Exception as error:
        if not hasattr(error, "__notes__"):
            error.add_note(f"This happened while {source} was loaded; the model was not changed.")
        if type(error) is RuntimeError and str(source) not in str(error):  # torch's, of tensors that do not fit
            raise RuntimeError(f"{source}: {error}") from error
        raise
