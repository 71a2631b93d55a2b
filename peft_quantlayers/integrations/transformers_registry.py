"""Makes transformers use our quantizers, and undoes that.

Its own for "hqq" loads no model, and the one for "aqlm" quantizes layers that a checkpoint says are dense. With
patches/transformers/2-hqq and patches/transformers/1-aqlm-list they work, and using ours becomes a choice.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import accelerate
import peft
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations import peft as adapters
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from ..formats.known_formats import known_formats
from ..layers.quantized_storage import QuantizedStorage
from .accelerate_sharding import prepare_to_shard
from .given_config import asked_config
from .interrupted_save import get_config_dict
from .replacements import Replacements
from .resized_head import resized_head
from .transformers_config import QuantlayersConfig
from .transformers_quantizer import QuantlayersHfQuantizer, gathered_state_of

logger = logging.getLogger(__name__)

# transformers 5.24 wants a PEFT that is not released. Its code for adapters is that of 5.23, which wants this one.
RELEASE, UNRELEASED_PEFT, WANTED_PEFT = (5, 24), "0.22.0", "0.20.0"

_taken_over: dict[str, tuple[Any, Any]] = {}
_replaced = Replacements()


def register() -> None:
    """Make transformers use our quantizers for "quantlayers", "hqq" and "aqlm"; a second call does nothing."""
    if _taken_over:
        return
    accept_released_peft()
    warn_of_unreleased_peft()
    for name in known_formats():
        _taken_over[name] = (AUTO_QUANTIZATION_CONFIG_MAPPING.get(name), AUTO_QUANTIZER_MAPPING.get(name))
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QuantlayersConfig
        AUTO_QUANTIZER_MAPPING[name] = QuantlayersHfQuantizer
    _replaced.replace(AutoHfQuantizer, "merge_quantization_configs", staticmethod(_merge_quantization_configs))
    _replaced.wrap(PreTrainedConfig, "get_config_dict", get_config_dict)
    _replaced.wrap(PreTrainedModel, "gather_sharded_state_dict_for_save", gathered_state_of)
    _replaced.wrap(PreTrainedModel, "_get_resized_lm_head", resized_head)
    _replaced.replace(PreTrainedModel, "dtype", property(_dtype))
    shard = accelerate.accelerator.fsdp2_prepare_model
    _replaced.replace(accelerate.accelerator, "fsdp2_prepare_model", functools.partial(prepare_to_shard, shard))


def accept_released_peft() -> None:
    """Let ``model.add_adapter`` and ``model.load_adapter`` of transformers 5.24 work with the PEFT that there is."""
    if Version(transformers.__version__).release[:2] == RELEASE and adapters.MIN_PEFT_VERSION == UNRELEASED_PEFT:
        _replaced.replace(adapters, "MIN_PEFT_VERSION", WANTED_PEFT)


def warn_of_unreleased_peft() -> None:
    """Say so where transformers' own ways to adapters want a newer PEFT than the installed one."""
    if Version(peft.__version__) < Version(adapters.MIN_PEFT_VERSION):
        logger.warning(
            "transformers %s wants PEFT %s in model.add_adapter and model.load_adapter, and PEFT %s is installed. "
            "peft.get_peft_model and PeftModel.from_pretrained work.",
            transformers.__version__,
            adapters.MIN_PEFT_VERSION,
            peft.__version__,
        )


def unregister() -> None:
    """Restore transformers' own quantizers."""
    for name, (config, quantizer) in _taken_over.items():
        for mapping, original in ((AUTO_QUANTIZATION_CONFIG_MAPPING, config), (AUTO_QUANTIZER_MAPPING, quantizer)):
            if original is None:
                mapping.pop(name, None)
            else:
                mapping[name] = original
    _replaced.restore()
    _taken_over.clear()


def _merge_quantization_configs(saved: Any, given: Any) -> Any:
    """transformers' own function, but for our models: it compares names of classes, which tell nothing here.

    The quantizer compares what was given with the layers, once it knows them.
    """
    merge_of_transformers = _replaced.original(AutoHfQuantizer, "merge_quantization_configs")
    method = saved.get("quant_method") if isinstance(saved, dict) else getattr(saved, "quant_method", None)
    if given is None or AUTO_QUANTIZER_MAPPING.get(method) is not QuantlayersHfQuantizer:
        return merge_of_transformers(saved, given)
    config = merge_of_transformers(saved, None)
    fields = given.fields if isinstance(given, QuantlayersConfig) else given
    if fields != config.fields:  # lm-eval reads a model's own config and hands it over
        config.asked = asked_config(given)
    return config


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """``PreTrainedModel.dtype``, of the first floating parameter: where that is a quantized weight, its layer's.

    transformers would take the dtype of a scale, save it as the model's, and load all other weights in it.
    """
    for module in model.modules():
        if isinstance(module, QuantizedStorage):
            return module.compute_dtype
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                return parameter.dtype
    return torch.get_default_dtype()
