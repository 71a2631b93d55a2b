"""The attribute by which PEFT takes a model for a quantized one when it is prepared for training."""

from typing import Any, cast

from transformers import PreTrainedModel


def mark_for_kbit_training(model: PreTrainedModel) -> None:
    """Let PEFT's ``prepare_model_for_kbit_training`` treat ``model``, of any method, as a quantized one.

    PEFT has no general hook: it knows some methods by name, and HQQ by ``model.hqq_quantized`` too. For such a model
    it leaves floating parameters in their dtype and turns on gradient checkpointing, which is right for all our
    layers. For any other it would cast the scales to float32.
    """
    cast(Any, model).hqq_quantized = True


def unmark_for_kbit_training(model: PreTrainedModel) -> None:
    """Take back :func:`mark_for_kbit_training`."""
    if hasattr(model, "hqq_quantized"):
        del model.hqq_quantized
