"""Measuring models: perplexity on a text, and the small real model that examples, tests and benchmarks run on."""

from .demo_model import demo_model_folder
from .perplexity import perplexity

__all__ = ["demo_model_folder", "perplexity"]
