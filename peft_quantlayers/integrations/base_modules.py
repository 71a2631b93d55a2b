"""A model as it is without PEFT's adapters. Imports PEFT's public classes."""

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..layers.quantized_storage import QuantizedStorage


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model; any other model is returned as it is. Adapters stay on its layers."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of all that :func:`base_model` would hold without adapters, each module once.

    A layer that an adapter wraps has its own name, not ``"….base_layer"``. The adapters' modules are left out, and so
    are those inside a quantized layer.
    """
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            is_layer = isinstance(module, BaseTunerLayer)
            module = module.get_base_layer() if is_layer else module.original_module
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in [] if isinstance(module, QuantizedStorage) else module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", base_model(model))
