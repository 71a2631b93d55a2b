"""Measuring models: perplexity, divergence, what a merge retains, memory that is kept for the backward pass."""

from .capture import Capture, capture
from .divergence import Divergence, divergence
from .memory import saved_for_backward
from .perplexity import perplexity

__all__ = ["Capture", "Divergence", "capture", "divergence", "perplexity", "saved_for_backward"]
