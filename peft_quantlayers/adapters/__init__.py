"""Adapters on quantized layers: the one LoRA layer, and merging back. Imports PEFT's public layers."""

from .lora import LoraQuantizedLinear, has_adapters
from .merge import LayerMergeReport, MergeReport, merge_back

__all__ = ["LayerMergeReport", "LoraQuantizedLinear", "MergeReport", "has_adapters", "merge_back"]
