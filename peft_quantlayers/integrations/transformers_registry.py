"""Makes transformers use our quantizers, and undoes that."""

from __future__ import annotations

from typing import Any

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from ..formats.checkpoint import QUANT_METHOD
from .published_aqlm import PublishedAqlmHfQuantizer
from .published_hqq import PublishedHqqHfQuantizer
from .transformers_config import QuantlayersConfig
from .transformers_quantizer import QuantlayersHfQuantizer

_taken_over: dict[str, tuple[Any, Any]] = {}


def register() -> None:
    """Make transformers use our quantizers for "quantlayers", "hqq" and "aqlm"; a second call does nothing."""
    if _taken_over:
        return
    for name, quantizer in (
        (QUANT_METHOD, QuantlayersHfQuantizer),
        ("hqq", PublishedHqqHfQuantizer),
        ("aqlm", PublishedAqlmHfQuantizer),
    ):
        _taken_over[name] = (AUTO_QUANTIZATION_CONFIG_MAPPING.get(name), AUTO_QUANTIZER_MAPPING.get(name))
        AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QuantlayersConfig
        AUTO_QUANTIZER_MAPPING[name] = quantizer


def unregister() -> None:
    """Restore transformers' own quantizers."""
    for name, (config, quantizer) in _taken_over.items():
        for mapping, original in ((AUTO_QUANTIZATION_CONFIG_MAPPING, config), (AUTO_QUANTIZER_MAPPING, quantizer)):
            if original is None:
                mapping.pop(name, None)
            else:
                mapping[name] = original
    _taken_over.clear()
