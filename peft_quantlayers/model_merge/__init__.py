"""Merging adapters into a whole model: ``merge_back``, its targets, its refusals and its measurements."""

from .merge_back import merge_back
from .merge_budget import plan_merge_bits
from .merged_model import MergedModel

__all__ = ["MergedModel", "merge_back", "plan_merge_bits"]
