"""Measuring models: perplexity, what a merge keeps, and the small real model of examples, tests and benchmarks."""

from .capture import Capture, capture
from .demo_model import demo_model_folder
from .perplexity import perplexity

__all__ = ["Capture", "capture", "demo_model_folder", "perplexity"]
