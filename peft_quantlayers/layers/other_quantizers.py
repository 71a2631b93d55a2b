"""Models that another library has quantized: layers of ours beside theirs could be neither saved nor loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..formats.checkpoint import QUANT_METHOD
from .codes_parameter import is_sharded
from .quantized_storage import QuantizedStorage


def refuse_other_quantizers(model: nn.Module) -> None:
    """Raise ValueError if another quantizer has been at ``model``: transformers says so, or its parameters do."""
    found = _named_quantizer(model) or _foreign_parameter(model)
    if found is not None:
        raise ValueError(
            f"the model is quantized by another method already ({found}). A config.json names one method, so the two "
            "together would be saved as a folder that nothing loads. Load the float model (without "
            "quantization_config) and quantize that. The model was not changed."
        )


def _named_quantizer(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        method = vars(module).get("quantization_method")
        # transformers sets it on models; a model that lost it may still have a config that goes into config.json.
        described: Any = getattr(getattr(module, "config", None), "quantization_config", None)
        if method is None and described is not None:
            fields = described if isinstance(described, dict) else vars(described)
            method = fields.get("quant_method")
        if method is not None and getattr(method, "value", method) != QUANT_METHOD:
            return f"{name + ': ' if name else ''}{getattr(method, 'value', method)}"
    return None


def _foreign_parameter(model: nn.Module) -> str | None:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedStorage):
            continue
        for tensor_name, parameter in module.named_parameters(recurse=False):
            is_number = parameter.is_floating_point() or parameter.is_complex()
            is_plain = type(parameter.data) is torch.Tensor or is_sharded(parameter)
            if not is_number or not is_plain:
                kind = parameter.dtype if is_plain else type(parameter.data).__name__
                return f"{name}.{tensor_name}, of a {type(module).__name__}, is {kind}"
    return None
