"""What quantizing, training and merging will take: memory, disk and time, before any weight is loaded."""

from .estimates import Estimate
from .merge_estimate import estimate_merging
from .quantizing_estimate import estimate_quantizing
from .reading_estimate import estimate_reading
from .training_estimate import estimate_training

__all__ = ["Estimate", "estimate_merging", "estimate_quantizing", "estimate_reading", "estimate_training"]
