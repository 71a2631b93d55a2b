"""Preparing a quantized model for training, and training codes. Imports lora, layers and the packages below them."""

from .kbit import prepare_model_for_kbit_training
from .loftq import LoftQResult, initialize_loftq
from .pv_tuning import PVTuner

__all__ = ["LoftQResult", "PVTuner", "initialize_loftq", "prepare_model_for_kbit_training"]
