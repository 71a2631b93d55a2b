"""LoRA-GA on quantized layers: hooks collect the gradient of the dequantized weight.

PEFT's ``preprocess_loraga`` makes the targets' weights require a gradient, which codes cannot. It needs the gradient
of the dense weight, ``grad_y.T @ x``, which the hooks compute without training any weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantlayers_kernels.tiled import weight_gradient

from ..integrations.private_peft import set_loraga_gradient

logger = logging.getLogger(__name__)


def estimate_gradients(model: nn.Module, targets: dict[str, nn.Module], train_step: Callable[[], Any]) -> None:
    """Store in every target the mean gradient of its weight over the backward passes of ``train_step``.

    Replaces PEFT's function of this name: the gradient is stored where PEFT looks for it, in the shape of the weight,
    as float32. All of these gradients are in memory at once. Meanwhile no parameter requires a gradient, and the model
    is in training mode; both are restored. A target that no gradient reaches gets none: PEFT initialises its adapter
    at random, and a warning names it. A head that shares its weight with the embeddings gets its own part of the
    gradient; PEFT on plain layers adds that of the embeddings.

    Args:
        model: with the ``targets`` in it.
        targets: linear layers and transformers' ``Conv1D``, quantized or not, by name.
        train_step: runs forward and backward passes.
    """
    gradients: dict[str, Tensor] = {}
    counts = dict.fromkeys(targets, 0)
    anchor = torch.zeros((), requires_grad=True)

    def watch(name: str) -> Callable[..., Tensor | None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():  # the first pass of a checkpointed block
                return None
            x = inputs[0].detach()

            def collect(grad: Tensor) -> None:
                gradient = weight_gradient(grad, x).float()
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
                counts[name] += 1

            # Nothing before the first layer requires a gradient, so its output would not either.
            output = output if output.requires_grad else output + anchor.to(output)
            output.register_hook(collect)
            return output

        return hook

    was_training = model.training
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    handles = [layer.register_forward_hook(watch(name)) for name, layer in targets.items()]
    model.train().requires_grad_(False)
    try:
        with torch.enable_grad():
            train_step()
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in model.named_parameters():
            if trained[name]:
                parameter.requires_grad = True
        model.train(was_training)
    for name, gradient in gradients.items():
        mean = gradient / counts[name]
        set_loraga_gradient(targets[name], mean.t() if isinstance(targets[name], Conv1D) else mean)
    missed = [name for name in targets if name not in gradients]
    if missed:
        logger.warning(
            "no gradient reached %d of %d layers, for example %s: their adapters start at random. train_step "
            "must run forward and backward passes through them.",
            len(missed),
            len(targets),
            missed[0],
        )
