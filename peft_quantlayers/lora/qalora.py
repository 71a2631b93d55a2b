"""QA-LoRA on quantized layers: an update that is constant in each quantization group, and so merges exactly.

The forward pass is PEFT's, written there for GPTQ, whose integer zeros cannot hold the result. With float zeros they
can: ``(code - zero) * scale + delta = (code - (zero - delta / scale)) * scale``. Imports PEFT's public classes.

Source: Xu et al. 2023, "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models".
"""

from __future__ import annotations

from typing import Any, cast

from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.variants import QALoraLinearVariant
from torch import Tensor, nn

from ..layers import QuantizedLinear


class MergeableQALoraVariant(QALoraLinearVariant):
    """PEFT's QA-LoRA with a merge, which PEFT does not implement."""

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def check_config(base: QuantizedLinear, config: LoraConfig) -> None:
    """Raise unless QA-LoRA with ``config`` is possible on ``base``, naming the layer and the way out.

    Raises:
        NotImplementedError: the weight has no float zero for each group, or ``config`` asks for a second variant.
        ValueError: ``qalora_group_size`` is not a multiple of the layer's group size, or does not divide its inputs.
    """
    name, size = base.layer_name, config.qalora_group_size
    if config.use_dora or config.lora_bias:
        raise NotImplementedError(
            f"{name}: use_qalora does not go together with use_dora or lora_bias. Set them False."
        )
    try:
        group_size = base.method.group_delta_size(base.spec, in_features=base.in_features)
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{name}: use_qalora needs a weight with a float zero for each group of inputs, so that the adapter can "
            f"be merged: {error} Or use plain LoRA (use_qalora=False)."
        ) from None
    if size % group_size or base.in_features % size:
        raise ValueError(
            f"{name}: qalora_group_size={size} must be a multiple of the layer's group_size={group_size} that divides "
            f"in_features={base.in_features}. Set qalora_group_size={group_size}."
        )


def can_be_qalora(base: QuantizedLinear) -> bool:
    """Whether QA-LoRA is possible on ``base``, with some group size."""
    try:
        base.method.group_delta_size(base.spec, in_features=base.in_features)
    except NotImplementedError:
        return False
    return True


def group_delta(layer: LoraLinear, adapter: str) -> Tensor:
    """The delta of ``adapter``, the same for all weights of a group: (out_features, n_pooled), float32.

    PEFT averages the inputs of a group and multiplies with the number of groups.
    """
    lora_A, lora_B = (cast(nn.Linear, lora[adapter]).weight.float() for lora in (layer.lora_A, layer.lora_B))
    n_pooled = lora_A.shape[1]
    return lora_B @ lora_A * (layer.scaling[adapter] * n_pooled * n_pooled / layer.in_features)
