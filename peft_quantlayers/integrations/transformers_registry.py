"""Makes transformers use our quantizers, and undoes that."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from ..formats.known_formats import known_formats
from .given_config import asked_config
from .transformers_config import QuantlayersConfig
from .transformers_quantizer import QuantlayersHfQuantizer

_taken_over: dict[str, tuple[Any, Any]] = {}
_merge_of_transformers: Any = AutoHfQuantizer.merge_quantization_configs


def register() -> None:
    """Make transformers use our quantizers for "quantlayers", "hqq" and "aqlm"; a second call does nothing."""
    if _taken_over:
        return
    for name in known_formats():
        _taken_over[name] = (AUTO_QUANTIZATION_CONFIG_MAPPING.get(name), AUTO_QUANTIZER_MAPPING.get(name))
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QuantlayersConfig
        AUTO_QUANTIZER_MAPPING[name] = QuantlayersHfQuantizer
    AutoHfQuantizer.merge_quantization_configs = staticmethod(_merge_quantization_configs)


def unregister() -> None:
    """Restore transformers' own quantizers."""
    for name, (config, quantizer) in _taken_over.items():
        for mapping, original in ((AUTO_QUANTIZATION_CONFIG_MAPPING, config), (AUTO_QUANTIZER_MAPPING, quantizer)):
            if original is None:
                mapping.pop(name, None)
            else:
                mapping[name] = original
    if _taken_over:
        AutoHfQuantizer.merge_quantization_configs = _merge_of_transformers
    _taken_over.clear()


def _merge_quantization_configs(saved: Any, given: Any) -> Any:
    """transformers' own function, but for our models: it compares names of classes, which tell nothing here.

    The quantizer compares what was given with the layers, once it knows them.
    """
    method = saved.get("quant_method") if isinstance(saved, dict) else getattr(saved, "quant_method", None)
    if given is None or AUTO_QUANTIZER_MAPPING.get(method) is not QuantlayersHfQuantizer:
        return _merge_of_transformers(saved, given)
    config = _merge_of_transformers(saved, None)
    config.asked = asked_config(given)
    return config
