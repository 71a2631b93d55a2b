"""Measuring models: perplexity, what a merge keeps, and the small real model of examples, tests and benchmarks."""

from .capture import Capture, capture
from .demo_model import demo_model_folder
from .memory import saved_for_backward
from .perplexity import perplexity

__all__ = ["Capture", "capture", "demo_model_folder", "perplexity", "saved_for_backward"]
