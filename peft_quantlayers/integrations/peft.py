"""Registers quantized layers with PEFT's LoRA dispatch and backends, and scale-only finetuning as a method of PEFT.

``LoraModel._create_new_module`` is wrapped once: it is the one place through which ``get_peft_model``, mixed
models, X-LoRA, ``PeftModel.from_pretrained``, ``load_adapter`` and transformers' ``add_adapter`` all go. The methods
that load and save adapters are wrapped too (:mod:`.adapter_loading`). A PEFT with a registry of dispatchers
(patches/peft/4-lora-dispatchers) is asked to register ours instead of the first. PEFT's other tuners need no
registration, since a quantized layer is an ``nn.Linear`` whose weight can be written; where PEFT has a registry of
quantization backends (patches/peft/3-backend-registry) they are given ours, and a model's status names it.

What else is extended are checks around adapters and merges. No patch makes them unnecessary, since PEFT has no place
for another package's checks; ``patches/README.md`` has each with its reason.

``preprocess_loraga`` is PEFT's; if a target is a quantized layer, our function estimates the gradients.
"""

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import peft.utils
from packaging.version import Version
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, PeftMixedModel, PeftModel
from peft.tuners import lora
from peft.tuners.lora import loraga
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType, hotswap, save_and_load
from torch import nn
from transformers import PreTrainedModel

from ..layers import QuantizedEmbedding, QuantizedLinear
from ..layers.placement import IN_ONE_PROCESS, check_weights_are_here, is_offloaded
from ..layers.quantized_layers import quantized_layers
from ..layers.stack import QuantizedStack
from ..lora import LoraQuantizedLinear, MergeAwareLoraConfig
from ..lora.base_fingerprint import base_fingerprints, is_recorded, recorded, warn_of_another_base
from ..lora.embedding_layer import LoraQuantizedEmbedding
from ..lora.loraga import estimate_gradients
from ..lora.merge_aware_config import check_rounded_layers
from ..lora.quantization_backend import QuantizedLinearBackend
from ..lora.stack_layer import LoraQuantizedStack
from ..scales import QuantScalesLayer
from . import adapter_loading
from . import peft_scales as scales
from .adapter_files import check_scaling
from .pattern_check import check_patterns
from .private_peft_names import TESTED_PEFT, check_names
from .replacements import Replacements
from .target_parameters import has_stacks, inject_in_order, refuse_stacks_as_modules
from .unchanged_model import unchanged_after_error

logger = logging.getLogger(__name__)

# Our entry in PEFT's registries.
NAME = "quantlayers"

# Empty while nothing is registered.
_replaced = Replacements()


def register() -> None:
    """Make PEFT wrap quantized layers in :class:`LoraQuantizedLinear`. Does nothing when it is done already."""
    if _replaced:
        return
    check_names()
    version = Version(peft.__version__)
    if not Version(TESTED_PEFT[0]) <= version < Version(TESTED_PEFT[1]):
        logger.warning(
            "peft %s is outside the range %s to %s that peft_quantlayers is tested with.", version, *TESTED_PEFT
        )
    # patches/peft/4-lora-dispatchers
    if hasattr(lora, "register_lora_dispatcher"):
        lora.register_lora_dispatcher(NAME, _dispatch)
    elif isinstance(LoraModel.__dict__.get("_create_new_module"), staticmethod):
        _replaced.replace(LoraModel, "_create_new_module", staticmethod(_create_new_module))
    else:
        raise ImportError(
            f"peft {version} has no static LoraModel._create_new_module to extend. Install peft>={TESTED_PEFT[0]},"
            f"<{TESTED_PEFT[1]}, or set PEFT_QUANTLAYERS_NO_REGISTER=1 and pass LoraQuantizedLinear through "
            "LoraConfig._register_custom_module."
        )
    # patches/peft/3-backend-registry
    if hasattr(peft.utils, "register_quantization_backend"):
        peft.utils.register_quantization_backend(NAME, _backend)
    _replaced.replace(LoraModel, "inject_adapter", _inject_adapter)
    _replaced.replace(LoraModel, "_inject_parameters", _inject_parameters)
    for owner in (PeftModel, PeftMixedModel):
        _replaced.wrap(owner, "from_pretrained", adapter_loading.from_pretrained)
        _replaced.wrap(owner, "load_adapter", adapter_loading.load_adapter)
    for module in (hotswap, save_and_load):
        ours = functools.partial(adapter_loading.load_peft_weights, module.load_peft_weights)
        _replaced.replace(module, "load_peft_weights", ours)
    _replaced.wrap(PeftModel, "save_pretrained", adapter_loading.save_pretrained)
    _replaced.wrap(PeftConfig, "from_pretrained", adapter_loading.config_from_pretrained)
    _replaced.wrap(PreTrainedModel, "load_adapter", adapter_loading.load_into_transformers)
    _replaced.replace(LoraModel, "merge_adapter", _merge_adapter)
    _replaced.replace(LoraModel, "_unload_and_optionally_merge", _unload)
    _replaced.replace(loraga, "estimate_gradients", _estimate_gradients)
    scales.register()
    # Saved adapters are read with our config, which knows two fields more.
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = MergeAwareLoraConfig


def unregister() -> None:
    """Restore PEFT's own dispatch."""
    if not _replaced:
        return
    if hasattr(lora, "unregister_lora_dispatcher"):
        lora.unregister_lora_dispatcher(NAME)
    _replaced.restore()
    if hasattr(peft.utils, "unregister_quantization_backend"):
        peft.utils.unregister_quantization_backend(NAME)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    scales.unregister()


def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    new_module = _dispatch(target, adapter_name, config=lora_config, **kwargs)
    if new_module is None:
        return _replaced.original(LoraModel, "_create_new_module")(lora_config, adapter_name, target, **kwargs)
    return new_module


def _inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's, after checks of the config. That of an adapter to be trained then records the quantized base.

    A merge-aware adapter on a layer that is not quantized is refused. If the config has a record, another base gives a
    warning. On a model with quantized layers, an error leaves the model as it was.
    """
    config = self.peft_config[adapter_name]
    check_patterns(config, model)
    check_rounded_layers(config, model)
    is_quantized = bool(quantized_layers(model))
    if is_quantized:
        check_scaling(config)
    # Before PiSSA and its like change the base, as they will when the adapter is loaded.
    found = base_fingerprints(model) if is_recorded(config) else {}
    warn_of_another_base(config, found, model, adapter_name)
    with unchanged_after_error(model) if is_quantized else nullcontext():
        _replaced.original(LoraModel, "inject_adapter")(self, model, adapter_name, *args, **kwargs)
    # An adapter that is loaded only to be used was trained before: on this base or on another, which is not recorded.
    if is_recorded(config) and not config.inference_mode:
        self.peft_config[adapter_name] = recorded(self.peft_config[adapter_name], found, model, adapter_name)


def _inject_parameters(
    self: LoraModel, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """PEFT's; in a model with quantized experts ours, which finds stacks by the names of their parameters."""
    if has_stacks(model):
        return inject_in_order(self, peft_config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    own = _replaced.original(LoraModel, "_inject_parameters")
    return own(self, peft_config, model, adapter_name, low_cpu_mem_usage)


def _merge_adapter(self: LoraModel, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    with _quantized_layers_merged(self, adapter_names, safe_merge):
        _replaced.original(LoraModel, "merge_adapter")(self, adapter_names, safe_merge)


def _unload(
    self: LoraModel,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    with _quantized_layers_merged(self, adapter_names, safe_merge) if merge else nullcontext():
        return _replaced.original(LoraModel, "_unload_and_optionally_merge")(
            self, merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


@contextmanager
def _quantized_layers_merged(model: LoraModel, adapter_names: list[str] | None, safe_merge: bool) -> Iterator[None]:
    """PEFT merges layer by layer. Around that all quantized layers are merged first, or none is.

    An offloaded model is left to PEFT, which fetches the weights of one layer at a time.
    """
    kinds = (LoraQuantizedLinear, LoraQuantizedStack, LoraQuantizedEmbedding)
    layers = [module for module in model.model.modules() if isinstance(module, kinds)]
    if any(is_offloaded(layer) for layer in layers):
        layers = []
    for layer in layers:
        check_weights_are_here(layer, "merging", if_sharded=f"Save the adapter, and merge it later. {IN_ONE_PROCESS}")
    states = [layer.snapshot() for layer in layers]
    try:
        for layer in layers:
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        with warnings.catch_warnings():
            if layers:
                warnings.filterwarnings("ignore", "All adapters are already merged")
            yield
    except BaseException:
        for layer, state in zip(layers, states, strict=True):
            layer.restore(state)
        raise


def _estimate_gradients(model: nn.Module, lora_config: Any, train_step: Callable[[], Any]) -> None:
    targets = dict(loraga.get_target_modules(model, lora_config))
    if any(isinstance(target, QuantizedLinear) for target in targets.values()):
        estimate_gradients(model, targets, train_step)
    else:
        _replaced.original(loraga, "estimate_gradients")(model, lora_config, train_step)


def _dispatch(target: nn.Module, adapter_name: str, *, config: Any, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for ``target``; None if it is not on a quantized layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(getattr(base, kwargs.get("parameter_name") or "", None), QuantizedStack):
        return LoraQuantizedStack(target, adapter_name, config=config, **kwargs)
    if kwargs.get("parameter_name") is None:
        refuse_stacks_as_modules(base)
    if not isinstance(base, (QuantizedLinear, QuantizedEmbedding)) or _has_custom_module(config, base):
        return None
    if isinstance(target, QuantScalesLayer):
        raise ValueError(
            f"{base.layer_name}: LoRA on top of tuned scales is not supported, since merging it would quantize with "
            "the untuned ones. Call merge_and_unload() on the tuned model first, then add LoRA."
        )
    if kwargs.get("parameter_name") is not None:
        raise ValueError(
            f"{base.layer_name}: target_parameters cannot name the weight of a quantized layer, which holds codes. "
            "Name the layer in target_modules instead."
        )
    if isinstance(base, QuantizedEmbedding):
        return LoraQuantizedEmbedding(target, adapter_name, config=config, **kwargs)
    return LoraQuantizedLinear(target, adapter_name, config=config, **kwargs)


def _backend(base_layer: nn.Module, **kwargs: Any) -> QuantizedLinearBackend | None:
    return QuantizedLinearBackend(base_layer) if isinstance(base_layer, QuantizedLinear) else None


def _has_custom_module(lora_config: Any, base: nn.Module) -> bool:
    custom = getattr(lora_config, "_custom_modules", None) or {}
    return any(isinstance(base, module_type) for module_type in custom)
