"""Scale-only finetuning as a PEFT method: its config and its layers."""

from .config import QuantScalesConfig
from .layers import QuantScalesLayer, QuantScalesLinear, QuantScalesNorm

__all__ = ["QuantScalesConfig", "QuantScalesLayer", "QuantScalesLinear", "QuantScalesNorm"]
