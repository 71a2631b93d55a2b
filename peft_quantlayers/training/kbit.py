"""Prepare a quantized model for training adapters on it."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers import QuantizedLinear


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    *,
    upcast: bool = True,
) -> nn.Module:
    """Freeze the base, convert what is not quantized to float32, and turn gradient checkpointing on.

    PEFT's function of the same name works on these models too; it leaves norms, embeddings and head in the model's
    dtype. Call either one before ``get_peft_model``.

    Args:
        model: a model with quantized layers. Changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass, for transformers models.
        gradient_checkpointing_kwargs: for ``gradient_checkpointing_enable``; ``use_reentrant`` is False by default.
        upcast: convert norms, embeddings, head and all other float16 and bfloat16 parameters outside quantized
            layers to float32, as QLoRA does. Quantized layers are never touched: they compute in their own
            ``compute_dtype``, whatever the dtype of the input.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no quantized layer.
    """
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ValueError(
            "the model has no quantized layer. Quantize it first: peft_quantlayers.quantize_model(model, config), or "
            "from_pretrained(..., quantization_config=config)."
        )
    for parameter in model.parameters():
        parameter.requires_grad = False
    if upcast:
        _upcast(model)
    if use_gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:  # reentrant checkpointing needs an input that requires a gradient
            cast(PreTrainedModel, model).enable_input_require_grads()
        cast(PreTrainedModel, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def _upcast(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.to(torch.float32)
