"""transformers' quantizer for published AQLM checkpoints, which it loads into our own layers."""

from __future__ import annotations

from typing import Any

from ..formats.published_aqlm import SCHEME
from .transformers_quantizer import QuantlayersHfQuantizer


class PublishedAqlmHfQuantizer(QuantlayersHfQuantizer):
    """Loads checkpoints of quant_method "aqlm", published ones and our own."""

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any) -> None:
        if not pre_quantized:
            fields = quantization_config.to_dict()
            raise ValueError(
                "transformers' AqlmConfig cannot quantize a model. Use peft_quantlayers.AQLMConfig("
                + ", ".join(f"{name}={fields.get(name, '...')}" for name in SCHEME)
                + ")."
            )
        super().__init__(quantization_config, pre_quantized=True, **kwargs)
