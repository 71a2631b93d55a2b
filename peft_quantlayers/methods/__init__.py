"""Quantization methods: from float weights to specs and tensors, and back. Imports formats and kernels only.

A method is one file (or folder) here, which registers itself: all of them are imported with this package.
"""

from .aqlm import AQLMConfig, AQLMMethod, AQLMSpec, move_aqlm_codes
from .base import QuantMethod
from .hqq import HQQConfig, HQQMethod, HQQSpec
from .quant_config import QuantConfig, config_type, make_config
from .registry import get_method, import_methods, register_method, registered_methods, spec_from_dict

__all__ = [
    "AQLMConfig",
    "AQLMMethod",
    "AQLMSpec",
    "HQQConfig",
    "HQQMethod",
    "HQQSpec",
    "QuantConfig",
    "QuantMethod",
    "config_type",
    "get_method",
    "make_config",
    "move_aqlm_codes",
    "register_method",
    "registered_methods",
    "spec_from_dict",
]

import_methods(__path__, __name__)
