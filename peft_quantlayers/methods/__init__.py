"""Quantization methods: from float weights to specs and tensors, and back. Imports formats and kernels only."""

from .aqlm import AQLMConfig, AQLMMethod, AQLMSpec, move_aqlm_codes
from .base import QuantMethod
from .config import QuantConfig
from .hqq import HQQConfig, HQQMethod, HQQSpec
from .registry import get_method, register_method, registered_methods, spec_from_dict

__all__ = [
    "AQLMConfig",
    "AQLMMethod",
    "AQLMSpec",
    "HQQConfig",
    "HQQMethod",
    "HQQSpec",
    "QuantConfig",
    "QuantMethod",
    "get_method",
    "move_aqlm_codes",
    "register_method",
    "registered_methods",
    "spec_from_dict",
]
