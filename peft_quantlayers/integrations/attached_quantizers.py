"""What a model that was quantized in memory carries, so that saving it writes what loading reads, or is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NoReturn

from torch import nn
from transformers import PreTrainedModel

from ..layers.quantized_storage import QuantizedStorage
from .transformers_quantizer import QuantlayersHfQuantizer


def attach_quantizers(model: nn.Module) -> None:
    """Let every transformers model in ``model``, itself included, save and load as a quantized one.

    Any other module with a ``save_pretrained`` of its own and quantized layers outside of those (a diffusers model)
    refuses to be saved with it: its loader does not know our layers, and would fill them with random numbers.
    """
    for module in _transformers_models(model):
        if _has_quantized_layers(module):
            QuantlayersHfQuantizer.attached_to(module)
    for module in model.modules():
        is_other = not isinstance(module, PreTrainedModel) and hasattr(type(module), "save_pretrained")
        if is_other and _has_quantized_layers(module, outside_transformers=True):
            UnsavedModel.attached_to(module)


class UnsavedModel:
    """In the place of a quantizer on a model whose library loads no quantized layers, until it is dense again."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name

    @classmethod
    def attached_to(cls, model: Any) -> None:
        """Make ``model.save_pretrained`` raise."""
        model.hf_quantizer = cls(type(model).__name__)
        model.save_pretrained = model.hf_quantizer.refuse

    def remove_quantization_config(self, model: Any) -> None:
        """Let ``model``, which is dense now, be saved again."""
        del model.save_pretrained, model.hf_quantizer

    def refuse(self, *_: object, **__: object) -> NoReturn:
        """Raise NotImplementedError with the way out."""
        raise NotImplementedError(
            f"{self.model_name} is quantized, and its from_pretrained knows no quantized layers: it would fill them "
            "with random numbers. Nothing was written. Save torch.save(model.state_dict(), file) instead; to load, "
            "build the model, quantize it with the same config, and call load_state_dict. Or save it dense, after "
            "peft_quantlayers.dequantize_model(model)."
        )


def _transformers_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    """The outermost transformers models in ``model``."""
    if isinstance(model, PreTrainedModel):
        yield model
        return
    for child in model.children():
        yield from _transformers_models(child)


def _has_quantized_layers(module: nn.Module, *, outside_transformers: bool = False) -> bool:
    if isinstance(module, QuantizedStorage):
        return True
    if outside_transformers and isinstance(module, PreTrainedModel):
        return False
    return any(_has_quantized_layers(child, outside_transformers=outside_transformers) for child in module.children())
