"""accelerate's FSDP2 in mixed precision, on quantized models: what is computed is what one process computes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from accelerate.utils import convert_outputs_to_fp32
from torch import nn

from ..layers.quantized_storage import QuantizedStorage


def prepare_to_shard(original: Callable[..., nn.Module], accelerator: Any, model: nn.Module) -> nn.Module:
    """accelerate's ``fsdp2_prepare_model``, without the cast of gathered parameters to half precision.

    That cast reaches scales, zeros and codebooks too, so that adapters would be trained on other weights than those
    that are saved. ``model`` runs in autocast instead, as it does in one process and in DDP.
    """
    policy = accelerator.state.fsdp_plugin.mixed_precision_policy
    if policy is None or not any(isinstance(module, QuantizedStorage) for module in model.modules()):
        return original(accelerator, model)
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    try:
        prepared = original(accelerator, model)
    finally:
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
    forward: Any = prepared.forward

    @functools.wraps(forward)
    def in_autocast(*args: Any, **kwargs: Any) -> Any:
        with accelerator.autocast():
            return forward(*args, **kwargs)

    prepared._original_forward = forward  # where accelerate's unwrap_model looks for it
    prepared.forward = convert_outputs_to_fp32(in_autocast)
    return prepared
