"""Measuring models: perplexity, the effect that a merge retains, and memory that is saved for the backward pass."""

from .capture import Capture, capture
from .memory import saved_for_backward
from .perplexity import perplexity

__all__ = ["Capture", "capture", "perplexity", "saved_for_backward"]
