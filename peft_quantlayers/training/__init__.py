"""Getting a quantized model ready to train, and training codes. Imports adapters, layers and below."""

from .kbit import prepare_model_for_kbit_training
from .pv_tuning import PVTuner

__all__ = ["PVTuner", "prepare_model_for_kbit_training"]
