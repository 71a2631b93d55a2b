"""Registers quantized layers with PEFT's LoRA dispatch and backends, and scale-only finetuning as a method of PEFT.

``LoraModel._create_new_module`` is wrapped once: it is the one place through which ``get_peft_model``, mixed
models, X-LoRA, ``PeftModel.from_pretrained``, ``load_adapter`` and transformers' ``add_adapter`` all go. A PEFT with
a registry of dispatchers (``patches/``) is asked to register ours instead, and nothing is wrapped. PEFT's other tuners
need no registration, since a quantized layer is an ``nn.Linear`` whose weight can be written; where PEFT has a
registry of quantization backends (``patches/`` again) they are given ours, and a model's status names it.

``preprocess_loraga`` is PEFT's; if a target is a quantized layer, our function estimates the gradients.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import peft
import peft.utils
from packaging.version import Version
from peft import LoraConfig, PeftMixedModel, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import lora
from peft.tuners.lora import loraga
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from ..layers import QuantizedLinear
from ..layers.placement import IN_ONE_PROCESS, check_weights_are_here, is_offloaded
from ..layers.selection import quantized_layers
from ..layers.stack import QuantizedStack
from ..lora import LoraQuantizedLinear, MergeAwareLoraConfig
from ..lora.base_fingerprint import base_fingerprints, is_recorded, recorded, warn_of_another_base
from ..lora.loraga import estimate_gradients
from ..lora.merge_aware_config import check_rounded_layers
from ..lora.quantization_backend import QuantizedLinearBackend
from ..lora.stack_layer import LoraQuantizedStack
from ..scales import QuantScalesLayer
from . import peft_scales as scales
from .adapter_files import check_file, check_loaded, check_scaling, local_file
from .pattern_check import check_patterns
from .target_parameters import has_stacks, inject_in_order

logger = logging.getLogger(__name__)

# The release series whose dispatch this file was written against and is tested with.
TESTED_PEFT = (Version("0.21.0"), Version("0.22.0"))

# Our entry in PEFT's registries.
NAME = "quantlayers"

# Functions of PEFT that ours replace, by owner and name: what PEFT calls there, and the owner's own entry, which is
# _INHERITED if it has none. Empty while nothing is registered.
_originals: dict[tuple[Any, str], tuple[Any, Any]] = {}
_INHERITED = object()


def register() -> None:
    """Make PEFT wrap quantized layers in :class:`LoraQuantizedLinear`. Does nothing when it is done already."""
    if _originals:
        return
    version = Version(peft.__version__)
    if not TESTED_PEFT[0] <= version < TESTED_PEFT[1]:
        logger.warning(
            "peft %s is outside the range %s to %s that peft_quantlayers is tested with.", version, *TESTED_PEFT
        )
    if hasattr(lora, "register_lora_dispatcher"):
        lora.register_lora_dispatcher(NAME, _dispatch)
    elif isinstance(LoraModel.__dict__.get("_create_new_module"), staticmethod):
        _take_over(LoraModel, "_create_new_module", staticmethod(_create_new_module))
    else:
        raise ImportError(
            f"peft {version} has no static LoraModel._create_new_module to extend. Install peft>={TESTED_PEFT[0]},"
            f"<{TESTED_PEFT[1]}, or set PEFT_QUANTLAYERS_NO_REGISTER=1 and pass LoraQuantizedLinear through "
            "LoraConfig._register_custom_module."
        )
    if hasattr(peft.utils, "register_quantization_backend"):
        peft.utils.register_quantization_backend(NAME, _backend)
    _take_over(LoraModel, "_prepare_model", _prepare_model)
    _take_over(LoraModel, "inject_adapter", _inject_adapter)
    _take_over(LoraModel, "_inject_parameters", _inject_parameters)
    for owner in (PeftModel, PeftMixedModel):
        _take_over(owner, "load_adapter", _load_adapter)
    _take_over(LoraModel, "merge_adapter", _merge_adapter)
    _take_over(LoraModel, "_unload_and_optionally_merge", _unload)
    _take_over(loraga, "estimate_gradients", _estimate_gradients)
    scales.register()
    # Saved adapters are read with our config, which knows two fields more.
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = MergeAwareLoraConfig


def unregister() -> None:
    """Restore PEFT's own dispatch."""
    if not _originals:
        return
    if hasattr(lora, "unregister_lora_dispatcher"):
        lora.unregister_lora_dispatcher(NAME)
    for (owner, name), (_, own) in _originals.items():
        if own is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
    _originals.clear()
    if hasattr(peft.utils, "unregister_quantization_backend"):
        peft.utils.unregister_quantization_backend(NAME)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    scales.unregister()


def _take_over(owner: Any, name: str, ours: Any) -> None:
    _originals[owner, name] = (getattr(owner, name), vars(owner).get(name, _INHERITED))
    setattr(owner, name, ours)


def _original(owner: Any, name: str) -> Any:
    return _originals[owner, name][0]


def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    new_module = _dispatch(target, adapter_name, config=lora_config, **kwargs)
    if new_module is None:
        return _original(LoraModel, "_create_new_module")(lora_config, adapter_name, target, **kwargs)
    return new_module


def _prepare_model(self: LoraModel, peft_config: Any, model: nn.Module) -> None:
    """PEFT's, after a check that refuses a merge-aware adapter on a layer that is not quantized."""
    check_patterns(peft_config, model)
    check_rounded_layers(peft_config, model)
    _original(LoraModel, "_prepare_model")(self, peft_config, model)


def _inject_adapter(self: LoraModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's; the config then records the quantized base. If it has a record, another base gives a warning."""
    config = self.peft_config[adapter_name]
    if quantized_layers(model):
        check_scaling(config)
    # Before PiSSA and its like change the base, as they will when the adapter is loaded.
    found = base_fingerprints(model) if is_recorded(config) else {}
    warn_of_another_base(config, found, model, adapter_name)
    _original(LoraModel, "inject_adapter")(self, model, adapter_name, *args, **kwargs)
    if found:
        self.peft_config[adapter_name] = recorded(self.peft_config[adapter_name], found, model, adapter_name)


def _inject_parameters(
    self: LoraModel, peft_config: Any, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
) -> list[str]:
    """PEFT's; in a model with quantized experts ours, which finds stacks by the names of their parameters."""
    if has_stacks(model):
        return inject_in_order(self, peft_config, model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
    return _original(LoraModel, "_inject_parameters")(self, peft_config, model, adapter_name, low_cpu_mem_usage)


def _load_adapter(self: Any, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    """PEFT's; on a model with quantized layers, files that are damaged or do not fit their config are errors."""
    load = _original(PeftModel if isinstance(self, PeftModel) else PeftMixedModel, "load_adapter")
    if not quantized_layers(self):
        return load(self, model_id, adapter_name, *args, **kwargs)
    source = local_file(model_id, kwargs.get("subfolder"))
    if source is not None:
        check_file(source)
    try:
        result = load(self, model_id, adapter_name, *args, **kwargs)
    except RuntimeError as error:  # torch's, of tensors that do not fit
        raise RuntimeError(f"{source or model_id}: {error}") from error
    check_loaded(self, self.peft_config[adapter_name], adapter_name, result, source or model_id)
    return result


def _merge_adapter(self: LoraModel, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
    with _quantized_layers_merged(self, adapter_names, safe_merge):
        _original(LoraModel, "merge_adapter")(self, adapter_names, safe_merge)


def _unload(
    self: LoraModel,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    with _quantized_layers_merged(self, adapter_names, safe_merge) if merge else nullcontext():
        return _original(LoraModel, "_unload_and_optionally_merge")(
            self, merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


@contextmanager
def _quantized_layers_merged(model: LoraModel, adapter_names: list[str] | None, safe_merge: bool) -> Iterator[None]:
    """PEFT merges layer by layer. Around that all quantized layers are merged first, or none is.

    An offloaded model is left to PEFT, which fetches the weights of one layer at a time.
    """
    kinds = (LoraQuantizedLinear, LoraQuantizedStack)
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
        _original(loraga, "estimate_gradients")(model, lora_config, train_step)


def _dispatch(target: nn.Module, adapter_name: str, *, config: Any, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for ``target``; None if it is not on a quantized layer."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(getattr(base, kwargs.get("parameter_name") or "", None), QuantizedStack):
        return LoraQuantizedStack(target, adapter_name, config=config, **kwargs)
    if not isinstance(base, QuantizedLinear) or _has_custom_module(config, base):
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
    return LoraQuantizedLinear(target, adapter_name, config=config, **kwargs)


def _backend(base_layer: nn.Module, **kwargs: Any) -> QuantizedLinearBackend | None:
    return QuantizedLinearBackend(base_layer) if isinstance(base_layer, QuantizedLinear) else None


def _has_custom_module(lora_config: Any, base: nn.Module) -> bool:
    custom = getattr(lora_config, "_custom_modules", None) or {}
    return any(isinstance(base, module_type) for module_type in custom)
