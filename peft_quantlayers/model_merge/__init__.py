"""Merging adapters into a whole model: ``merge_back``, the targets it finds, what it refuses and what it measures."""

from .merge_back import merge_back

__all__ = ["merge_back"]
