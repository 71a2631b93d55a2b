"""What merging a LoRA adapter into its quantized model takes."""

from __future__ import annotations

import math
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..formats import QuantSpec
from ..layers import QuantizedLinear
from ..layers.quantized_layers import layers_without_copies
from ..methods import QuantConfig
from ..model_merge import merge_back
from ..report import summary
from .estimates import Estimate
from .live_bytes import bytes_of_imports
from .meta_model import quantized_on_meta
from .sampled_layers import Work, sample_layers

# Of a weight that is merged, in float32 beside what quantizing takes: the weight before, and the delta.
_LAYER_COPIES = 2


def estimate_merging(model: PreTrainedModel, config: QuantConfig | None, *, rank: int = 8) -> Estimate:
    """Memory, disk and time of ``merge_back`` and of saving the result, without calibration.

    Args:
        model: on the meta device, float or quantized; it is changed.
        config: how it will be quantized; None if it is.
        rank: of the adapter, which is taken to be on every quantized layer.

    Raises:
        ValueError: a float model without ``config``; a shape that the config does not fit.
    """
    specs = quantized_on_meta(model, config)
    shapes = {name: layer.quantized_weight.shape for name, layer in layers_without_copies(model).items()}
    found = summary(model)
    largest = max((math.prod(shape[-2:]) for shape in shapes.values()), default=0) * 4 * _LAYER_COPIES
    sample = sample_layers(specs, shapes, work_on=partial(_merging, rank))
    return Estimate(
        step="merge",
        memory={
            "libraries": bytes_of_imports(),
            "weights": found.nbytes,
            "merged weights": sum(module.nbytes for module in found.quantized),
            "adapter": sum(4 * rank * sum(shape[-2:]) * math.prod(shape[:-2]) for shape in shapes.values()),
            "largest layer": sample.layer_bytes + largest,
        },
        disk=found.nbytes,
        seconds=sample.seconds,
    )


def _merging(rank: int, weight: Tensor, spec: QuantSpec) -> Work:
    """What merges an adapter of random numbers into ``weight``, (out, in)."""
    layer = QuantizedLinear.from_weight(weight, None, spec)
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=min(rank, *weight.shape), target_modules=["0"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=weight.std().item() / 100)
    return partial(merge_back, model, progress=False)
