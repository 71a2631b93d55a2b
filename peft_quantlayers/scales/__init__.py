"""Scale-only finetuning as a PEFT method: its config and its layers."""

from .layers import QuantScalesLayer, QuantScalesLinear, QuantScalesNorm
from .scales_config import QuantScalesConfig

__all__ = ["QuantScalesConfig", "QuantScalesLayer", "QuantScalesLinear", "QuantScalesNorm"]
