"""Getting a quantized model ready to train. Imports adapters, layers and below."""

from .kbit import prepare_model_for_kbit_training

__all__ = ["prepare_model_for_kbit_training"]
