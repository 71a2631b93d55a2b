"""Adapters on quantized layers: LoRA, scale-only finetuning, merge-aware training, and merging back."""

from .aware import MergeAwareCallback, enable_merge_aware
from .lora import LoraQuantizedLinear, has_adapters, set_merge_strategy
from .merge import merge_back
from .projections import fuse_projections
from .report import LayerMergeReport, MergeReport
from .scales import QuantScalesLayer, QuantScalesLinear, QuantScalesNorm
from .scales_config import QuantScalesConfig
from .stamp import MergeAwareLoraConfig

__all__ = [
    "LayerMergeReport",
    "LoraQuantizedLinear",
    "MergeAwareCallback",
    "MergeAwareLoraConfig",
    "MergeReport",
    "QuantScalesConfig",
    "QuantScalesLayer",
    "QuantScalesLinear",
    "QuantScalesNorm",
    "enable_merge_aware",
    "fuse_projections",
    "has_adapters",
    "merge_back",
    "set_merge_strategy",
]
