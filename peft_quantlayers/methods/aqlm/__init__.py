"""Additive Quantization of Language Models: spec, config and method."""

from .method import AQLMMethod, move_aqlm_codes
from .spec import AQLMConfig, AQLMSpec

__all__ = ["AQLMConfig", "AQLMMethod", "AQLMSpec", "move_aqlm_codes"]
