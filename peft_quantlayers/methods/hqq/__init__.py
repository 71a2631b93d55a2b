"""Half-Quadratic Quantization: spec, config and method."""

from .method import HQQMethod
from .spec import HQQConfig, HQQSpec

__all__ = ["HQQConfig", "HQQMethod", "HQQSpec"]
