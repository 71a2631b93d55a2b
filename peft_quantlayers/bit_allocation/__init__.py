"""Bits under a budget: how much each layer's quantization costs the model's predictions, and who gets which bits."""

from .bit_plan import BitPlan
from .plan_bits import plan_bits

__all__ = ["BitPlan", "plan_bits"]
