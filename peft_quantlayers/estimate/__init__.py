"""What quantizing, training and merging will take: memory, disk and time, before any weight is loaded."""

from .estimates import Estimate
from .merging import estimate_merging
from .quantizing import estimate_quantizing
from .training import estimate_training

__all__ = ["Estimate", "estimate_merging", "estimate_quantizing", "estimate_training"]
