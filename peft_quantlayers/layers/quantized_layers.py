"""The quantized layers of a model, by name."""

from torch import nn

from ..arguments import check_model
from .embedding import QuantizedEmbedding
from .linear import QuantizedLinear
from .stack import QuantizedStack

QuantizedLayer = QuantizedLinear | QuantizedStack | QuantizedEmbedding


def quantized_modules(model: nn.Module) -> dict[str, QuantizedLinear]:
    """All quantized linear layers of ``model`` by name; TypeError if it is not a module."""
    check_model("quantized_modules", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def quantized_stacks(model: nn.Module) -> dict[str, QuantizedStack]:
    """All quantized stacks of experts of ``model`` by name; TypeError if it is not a module."""
    check_model("quantized_stacks", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedStack)}


def quantized_embeddings(model: nn.Module) -> dict[str, QuantizedEmbedding]:
    """All quantized embedding tables of ``model`` by name; TypeError if it is not a module."""
    check_model("quantized_embeddings", model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedEmbedding)}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """:func:`quantized_modules`, :func:`quantized_stacks` and :func:`quantized_embeddings` in the order of the model.

    Layers that share their tensors, such as an embedding and a head, are both in it.
    """
    check_model("quantized_layers", model)
    kinds = (QuantizedLinear, QuantizedStack, QuantizedEmbedding)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def layers_without_copies(model: nn.Module) -> dict[str, QuantizedLayer]:
    """:func:`quantized_layers` without those that share the tensors of an earlier one."""
    found: dict[str, QuantizedLayer] = {}
    seen: set[int] = set()
    for name, layer in quantized_layers(model).items():
        if id(layer) not in seen:
            found[name] = layer
        seen |= {id(other) for other in layer.sharing}
    return found


def replaced_parameters(model: nn.Module) -> dict[str, QuantizedLayer]:
    """:func:`quantized_layers`, each by the name of the parameter that the dense model has in its place."""
    layers = quantized_layers(model)
    return {name if isinstance(each, QuantizedStack) else f"{name}.weight": each for name, each in layers.items()}
