"""Prepare a quantized model for training adapters on it."""

import logging
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from quantlayers_kernels.precision import product_dtype

from ..layers import QuantizedEmbedding
from ..layers.quantized_storage import QuantizedStorage

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)


def prepare_model_for_kbit_training(
    model: nn.Module,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    *,
    upcast: bool = True,
) -> nn.Module:
    """Freeze the base, convert what is not quantized to float32, and turn gradient checkpointing on.

    PEFT's function of the same name works on these models too; it leaves norms, embeddings and head in the model's
    dtype. Call PEFT's before ``get_peft_model``, since it freezes adapters too. This one leaves adapters as they are,
    their dtype and what is trained, so it may be called before or after.

    Args:
        model: a model with quantized layers. Changed in place.
        use_gradient_checkpointing: recompute activations in the backward pass, for transformers models.
        gradient_checkpointing_kwargs: for ``gradient_checkpointing_enable``; ``use_reentrant`` is False by default.
        upcast: convert norms, embeddings, head and all other float16 and bfloat16 parameters outside quantized
            layers to float32, as QLoRA does; a log line says how many bytes that takes. Quantized layers are never
            touched: they compute in their own ``compute_dtype``, whatever the dtype of the input; but the rows that
            quantized embeddings give are float32. Experts that are not
            quantized keep their dtype, since they may be most of the model, and get their inputs in it.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no quantized layer.
    """
    if not any(isinstance(module, QuantizedStorage) for module in model.modules()):
        raise ValueError(
            "the model has no quantized layer. Quantize it first: peft_quantlayers.quantize_model(model, config), or "
            "from_pretrained(..., quantization_config=config)."
        )
    if not _has_trained_parts(model):  # otherwise PEFT has frozen the base, except what it trains
        for parameter in model.parameters():
            parameter.requires_grad = False
    if upcast:
        _upcast(model, left_alone={id(parameter) for parameter in _adapter_parameters(model)})
    if use_gradient_checkpointing and hasattr(model, "gradient_checkpointing_enable"):
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        if kwargs["use_reentrant"]:  # reentrant checkpointing needs an input that requires a gradient
            cast(PreTrainedModel, model).enable_input_require_grads()
        cast(PreTrainedModel, model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def _has_trained_parts(model: nn.Module) -> bool:
    """Whether PEFT has made a choice of what is trained: adapters, modules trained in full, prompts."""
    parts = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)
    return any(isinstance(cast(object, module), parts) for module in model.modules())


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The matrices of adapters, which compute in their own dtype. Copies of whole modules follow the model's."""
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(parameter) for parameter in module.get_base_layer().parameters()}
            yield from (each for each in cast(nn.Module, module).parameters() if id(each) not in base)


def _upcast(model: nn.Module, *, left_alone: set[int]) -> None:
    n_bytes = 0
    is_faster_in_half = False
    for name, module in model.named_modules():
        if isinstance(module, QuantizedEmbedding):  # costs nothing, and the residual stream begins here
            module.compute_dtype = torch.float32
        if isinstance(module, QuantizedStorage):
            continue
        parameters = [
            parameter
            for parameter in module.parameters(recurse=False)
            if parameter.dtype in HALF and id(parameter) not in left_alone
        ]
        if parameters and _holds_experts(name, module):
            module.register_forward_pre_hook(_in_own_dtype, with_kwargs=True)
            continue
        for parameter in parameters:
            is_matrix = parameter.dim() == 2
            is_faster_in_half |= is_matrix and product_dtype(parameter.dtype, parameter.device) == parameter.dtype
            parameter.data = parameter.data.to(torch.float32)
            n_bytes += parameter.nelement() * 2
    if n_bytes:
        logger.warning(
            "norms, embeddings, head and other parameters that are not quantized are float32 now, as in QLoRA: %s "
            "more. upcast=False keeps their dtype%s.",
            f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e7 else f"{n_bytes / 1e3:.0f} kB",
            ", in which the head's product is faster here" if is_faster_in_half else "",
        )


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether the module ``name`` holds weights of a mixture's experts: by its name, or a stack of matrices."""
    if "experts" in name.split("."):
        return True
    own = list(module.parameters(recurse=False))
    has_stack = any(parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in own)
    return has_stack and len(own) == len(list(module.parameters())) and not isinstance(module, _ConvNd)


def _in_own_dtype(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Inputs of experts in the dtype of their weights: the norm before them gives float32 now."""
    # Not of codes, nor of their scales; PEFT moves a wrapped parameter into a child while it computes.
    owners = (each for each in module.modules() if not isinstance(each, QuantizedStorage))
    dtype = next(parameter.dtype for owner in owners for parameter in owner.parameters(recurse=False))

    def cast_input(given: Any) -> Any:
        is_float = isinstance(given, Tensor) and given.is_floating_point()
        return given.to(dtype) if is_float else given

    return tuple(map(cast_input, args)), {name: cast_input(given) for name, given in kwargs.items()}
