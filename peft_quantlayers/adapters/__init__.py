"""Adapters on quantized layers: LoRA, scale-only finetuning, and merging back. Imports PEFT's public layers."""

from .lora import LoraQuantizedLinear, has_adapters
from .merge import LayerMergeReport, MergeReport, merge_back
from .scales import QuantScalesLayer, QuantScalesLinear, QuantScalesNorm
from .scales_config import QuantScalesConfig

__all__ = [
    "LayerMergeReport",
    "LoraQuantizedLinear",
    "MergeReport",
    "QuantScalesConfig",
    "QuantScalesLayer",
    "QuantScalesLinear",
    "QuantScalesNorm",
    "has_adapters",
    "merge_back",
]
