"""What would make a training run fail or change nothing, told before it starts."""

import logging
import os

from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

logger = logging.getLogger(__name__)


def check_before_training(model: nn.Module) -> None:
    """Warn of frozen adapters; raise ValueError if accelerate is about to use FSDP1 or DeepSpeed."""
    refuse_fsdp1()
    refuse_deepspeed()
    warn_of_copies_on_cpus()
    warn_of_frozen_adapters(model)


def refuse_fsdp1() -> None:
    """Raise ValueError if accelerate is about to use FSDP1.

    It joins all parameters of a module into one float tensor; torch's own error does not name the way out.
    """
    if fsdp_version() == 1:
        raise ValueError(
            "FSDP1 joins all parameters into one float tensor, of which the codes of quantized layers cannot be part. "
            "Use FSDP2: fsdp_version: 2 in accelerate's config, or TrainingArguments(fsdp_config={'version': 2})."
        )


def fsdp_version() -> int | None:
    """Which FSDP the accelerator that there is will shard with; None for none."""
    if not is_initialized() or AcceleratorState().distributed_type != DistributedType.FSDP:
        return None
    return int(AcceleratorState().fsdp_plugin.fsdp_version)


def refuse_deepspeed() -> None:
    """Raise ValueError if accelerate or the Trainer was told to use DeepSpeed.

    Its ZeRO stages flatten parameters into buffers of one floating dtype and split these at any number.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DeepSpeed flattens parameters into buffers of one floating dtype, of which the codes of quantized layers "
            "cannot be part. Use DDP, or FSDP2 for a base that does not fit into one device: docs/distributed.md."
        )


def warn_of_copies_on_cpus() -> None:
    """Warn where accelerate was told to shard, and will not: without accelerators it runs DDP, and says nothing."""
    if _is_set("ACCELERATE_USE_FSDP") and fsdp_version() is None:
        logger.warning(
            "accelerate shards over accelerators only: here, on CPUs, every process holds the whole model. "
            "from_pretrained(..., distributed_config=DistributedConfig(fsdp_size=N)) shards the base, as `train "
            "--fsdp_size N` does."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("true", "1", "yes")


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
