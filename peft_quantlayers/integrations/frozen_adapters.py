"""Adapters that a training run would not change, told before it starts."""

import logging

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)


def warn_of_frozen_adapters(model: nn.Module) -> None:
    """Warn if ``model`` carries adapters that were made to be trained, and no parameter of it is trainable.

    PEFT's ``prepare_model_for_kbit_training`` freezes adapters too. With gradient checkpointing the loss has a
    gradient nevertheless, of the embeddings' outputs, so that training runs to its end and changes nothing.
    """
    configs = getattr(model, "peft_config", None) or {}
    if all(config.inference_mode for config in configs.values()):
        return
    has_adapters = any(isinstance(module, BaseTunerLayer) for module in model.modules())
    if has_adapters and not any(parameter.requires_grad for parameter in model.parameters()):
        logger.warning(
            "no parameter of the model is trainable, so training would not change the adapter: PEFT's "
            "prepare_model_for_kbit_training freezes adapters as well. Call it before get_peft_model, or use "
            "peft_quantlayers.prepare_model_for_kbit_training. model.set_adapter(%r) makes it trainable again.",
            next(iter(configs)),
        )
