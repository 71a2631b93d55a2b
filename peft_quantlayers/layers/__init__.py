"""Quantized layers and stacks of experts, and putting them into a model. Imports formats and methods; never PEFT."""

from .activation_bits import RoundedActivations, set_activation_bits
from .dense_types import DenseType, register_dense_type
from .embedding import QuantizedEmbedding
from .linear import AQLMLinear, HQQLinear, QuantizedLinear, layer_type
from .low_rank_branch import LowRankBranch
from .quantized_layers import quantized_modules, quantized_stacks
from .replace import dequantize_model, quantize_module
from .selection import quantizable_modules
from .stack import QuantizedStack

__all__ = [
    "AQLMLinear",
    "DenseType",
    "HQQLinear",
    "LowRankBranch",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedStack",
    "RoundedActivations",
    "dequantize_model",
    "layer_type",
    "quantizable_modules",
    "quantize_module",
    "quantized_modules",
    "quantized_stacks",
    "register_dense_type",
    "set_activation_bits",
]
