"""Products with AQLM weights: each group of weights is a scaled sum of codebook entries."""

from .op import aqlm_dequantize, aqlm_linear, linear

__all__ = ["aqlm_dequantize", "aqlm_linear", "linear"]
