"""What merging a LoRA adapter into its quantized model takes."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from ..layers.quantized_layers import layers_without_copies
from ..methods import QuantConfig
from ..report import summary
from .estimates import Estimate
from .live_bytes import bytes_of_imports
from .meta_model import quantized_on_meta
from .quantizing import sample_layers

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
    sample = sample_layers(specs, shapes)
    largest = max((math.prod(shape[-2:]) for shape in shapes.values()), default=0) * 4 * _LAYER_COPIES
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
