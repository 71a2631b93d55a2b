"""Adapters on quantized layers: the one LoRA layer, merge-aware training, and merging back."""

from .aware import MergeAwareCallback, enable_merge_aware
from .lora import LoraQuantizedLinear, has_adapters, set_merge_strategy
from .merge import merge_back
from .report import LayerMergeReport, MergeReport
from .stamp import MergeAwareLoraConfig

__all__ = [
    "LayerMergeReport",
    "LoraQuantizedLinear",
    "MergeAwareCallback",
    "MergeAwareLoraConfig",
    "MergeReport",
    "enable_merge_aware",
    "has_adapters",
    "merge_back",
    "set_merge_strategy",
]
