"""Registers quantized layers with PEFT's LoRA dispatch and backends, and scale-only finetuning as a method of PEFT.

``LoraModel._create_new_module`` is wrapped once: it is the one place through which ``get_peft_model``, mixed
models, X-LoRA, ``PeftModel.from_pretrained``, ``load_adapter`` and transformers' ``add_adapter`` all go. A PEFT with
a registry of dispatchers (``patches/``) is asked to register ours instead, and nothing is wrapped. PEFT's other tuners
need no registration, since a quantized layer is an ``nn.Linear`` whose weight can be written; where PEFT has a
registry of quantization backends (``patches/`` again) they are given ours, and a model's status names it.

``preprocess_loraga`` is PEFT's; where it estimates gradients and meets a quantized layer, ours does that.
"""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import peft
import peft.utils
from packaging.version import Version
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners import lora
from peft.tuners.lora import loraga
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from torch import nn

from ..adapters import LoraQuantizedLinear, MergeAwareLoraConfig, QuantScalesLayer
from ..adapters.backend import QuantizedLinearBackend
from ..adapters.loraga import estimate_gradients
from ..layers import QuantizedLinear
from . import scales

logger = logging.getLogger(__name__)

# The release series whose dispatch this file was written against and is tested with.
TESTED_PEFT = (Version("0.21.0"), Version("0.22.0"))

# Our entry in PEFT's registries.
NAME = "quantlayers"

# What of PEFT ours has taken the place of; empty while nothing is registered.
_originals: dict[str, Any] = {}


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
        _originals["create_new_module"] = LoraModel._create_new_module
        LoraModel._create_new_module = staticmethod(_create_new_module)
    else:
        raise ImportError(
            f"peft {version} has no static LoraModel._create_new_module to extend. Install peft>={TESTED_PEFT[0]},"
            f"<{TESTED_PEFT[1]}, or set PEFT_QUANTLAYERS_NO_REGISTER=1 and pass LoraQuantizedLinear through "
            "LoraConfig._register_custom_module."
        )
    if hasattr(peft.utils, "register_quantization_backend"):
        peft.utils.register_quantization_backend(NAME, _backend)
    _originals["unload"] = LoraModel._unload_and_optionally_merge
    LoraModel._unload_and_optionally_merge = _unload
    _originals["estimate_gradients"] = loraga.estimate_gradients
    loraga.estimate_gradients = _estimate_gradients
    scales.register()
    # Saved adapters are read with our config, which knows one field more.
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = MergeAwareLoraConfig


def unregister() -> None:
    """Put PEFT's own dispatch back."""
    if not _originals:
        return
    if "create_new_module" in _originals:
        LoraModel._create_new_module = staticmethod(_originals["create_new_module"])
    else:
        lora.unregister_lora_dispatcher(NAME)
    LoraModel._unload_and_optionally_merge = _originals["unload"]
    loraga.estimate_gradients = _originals["estimate_gradients"]
    _originals.clear()
    if hasattr(peft.utils, "unregister_quantization_backend"):
        peft.utils.unregister_quantization_backend(NAME)
    PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] = LoraConfig
    scales.unregister()


def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
    new_module = _dispatch(target, adapter_name, config=lora_config, **kwargs)
    if new_module is None:
        return _originals["create_new_module"](lora_config, adapter_name, target, **kwargs)
    return new_module


def _unload(
    self: LoraModel,
    merge: bool = True,
    progressbar: bool = False,
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> Any:
    """PEFT's, which takes the adapters off layer by layer: here all quantized layers are merged first, or none is."""
    layers = [module for module in self.model.modules() if isinstance(module, LoraQuantizedLinear)]
    with warnings.catch_warnings():
        if merge and layers:
            states = [layer.merge_state() for layer in layers]
            try:
                for layer in layers:
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            except BaseException:
                for layer, state in zip(layers, states, strict=True):
                    layer.restore(state)
                raise
            warnings.filterwarnings("ignore", "All adapters are already merged")
        return _originals["unload"](
            self, merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )


def _estimate_gradients(model: nn.Module, lora_config: Any, train_step: Callable[[], Any]) -> None:
    targets = dict(loraga.get_target_modules(model, lora_config))
    if any(isinstance(target, QuantizedLinear) for target in targets.values()):
        estimate_gradients(model, targets, train_step)
    else:
        _originals["estimate_gradients"](model, lora_config, train_step)


def _dispatch(target: nn.Module, adapter_name: str, *, config: Any, **kwargs: Any) -> nn.Module | None:
    """The LoRA layer for ``target``; None where that is not ours to make."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
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
