"""LoRA on quantized layers: the layer, fused projections, QA-LoRA and merge-aware training."""

from .fused_projections import fuse_projections
from .layer import LoraQuantizedLinear, has_adapters
from .merge_aware import MergeAwareCallback, enable_merge_aware
from .merge_aware_config import MergeAwareLoraConfig
from .merge_strategy import set_merge_strategy
from .stack_layer import LoraQuantizedStack

__all__ = [
    "LoraQuantizedLinear",
    "LoraQuantizedStack",
    "MergeAwareCallback",
    "MergeAwareLoraConfig",
    "enable_merge_aware",
    "fuse_projections",
    "has_adapters",
    "set_merge_strategy",
]
