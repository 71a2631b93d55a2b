"""Measuring models: perplexity, what a merge retains, and the memory that a forward pass saves for backward."""

from .capture import Capture, capture
from .memory import saved_for_backward
from .perplexity import perplexity

__all__ = ["Capture", "capture", "perplexity", "saved_for_backward"]
