"""Quantization methods: from float weights to specs and tensors, and back. Imports formats and kernels only."""

from .aqlm import AQLMMethod, AQLMSpec, move_aqlm_codes
from .config import AQLMConfig, HQQConfig, QuantConfig
from .hqq import HQQMethod, HQQSpec
from .method import QuantMethod, get_method, register_method, registered_methods, spec_from_dict

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
