"""Merging adapters into a whole model: ``merge_back``, its targets, its refusals and its measurements."""

from .merge_back import merge_back
from .merged_model import MergedModel

__all__ = ["MergedModel", "merge_back"]
