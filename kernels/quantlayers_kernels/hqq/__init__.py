"""Products with HQQ weights: packed codes with a float scale and a float zero per group."""

from .op import hqq_dequantize, hqq_linear, linear

__all__ = ["hqq_dequantize", "hqq_linear", "linear"]
