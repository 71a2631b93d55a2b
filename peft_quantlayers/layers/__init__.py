"""Quantized linear layers, and putting them into a model. Imports formats and methods; never PEFT."""

from .linear import AQLMLinear, HQQLinear, QuantizedLinear, layer_type
from .low_rank_branch import LowRankBranch
from .replace import dequantize_model, quantizable_modules, quantize_module, quantize_modules, quantized_modules

__all__ = [
    "AQLMLinear",
    "HQQLinear",
    "LowRankBranch",
    "QuantizedLinear",
    "dequantize_model",
    "layer_type",
    "quantizable_modules",
    "quantize_module",
    "quantize_modules",
    "quantized_modules",
]
