"""The quantization config that our models carry in transformers: a checkpoint format and its JSON fields."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..formats.checkpoint import QUANT_METHOD
from ..formats.checkpoint_format import CheckpointFormat, ModelDescription
from ..formats.known_formats import choose_format, known_formats
from ..formats.quantized_weight import is_lossy_in_half
from ..layers import QuantizedLinear
from ..layers.quantized_layers import quantized_embeddings, quantized_layers, quantized_stacks
from ..layers.quantized_storage import QuantizedStorage
from ..methods import QuantConfig
from .private_transformers import kept_dtype


class QuantlayersConfig(QuantizationConfigMixin):
    """What a quantized checkpoint says about itself. Made by loading and quantizing, not by hand.

    Attributes:
        checkpoint_format: how the checkpoint is written.
        fields: the ``quantization_config`` in ``config.json``, in that format.
        quant_method: the name under which transformers looks for the quantizer of such a model.
        asked: what a user passed as ``quantization_config`` beside the saved model, or None.
    """

    def __init__(self, checkpoint_format: CheckpointFormat, fields: dict[str, Any]) -> None:
        self.quant_method = checkpoint_format.name
        self.checkpoint_format = checkpoint_format
        self.fields = fields
        self.asked: QuantConfig | None = None

    @classmethod
    def from_model(cls, model: nn.Module) -> QuantlayersConfig:
        """The config that describes ``model`` as it is now, in the first format that can hold it."""
        return cls.of(describe_model(model))

    @classmethod
    def of(cls, description: ModelDescription) -> QuantlayersConfig:
        """The config of a model in memory with this description."""
        checkpoint_format = choose_format(description)
        config = cls(checkpoint_format, checkpoint_format.write(description))
        config.quant_method = QUANT_METHOD  # in memory the model is ours, in whichever format it is written
        return config

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        if "interrupted_save" in config_dict:
            raise ValueError(f"the folder holds no model: {config_dict['interrupted_save']}.")
        method, formats = config_dict.get("quant_method"), known_formats()
        if method not in formats:
            raise ValueError(
                f"quantization_config: quant_method={method!r} is not read here; known are {list(formats)}."
            )
        config = cls(formats[method], dict(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.fields)


def describe_model(model: nn.Module) -> ModelDescription:
    """What a checkpoint has to say about ``model``, a transformers model."""
    layers = quantized_layers(model)
    compute_dtype, compute_dtypes = _compute_dtypes(model, layers)
    is_half = model.dtype == torch.float16
    return ModelDescription(
        specs={name: layer.spec for name, layer in layers.items()},
        compute_dtype=compute_dtype,
        compute_dtypes=compute_dtypes,
        branches={name: layer.branch.rank for name, layer in layers.items() if layer.branch is not None},
        # By isinstance, as readers of published checkpoints look for the layers that they replace.
        dense_linears=tuple(
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and not isinstance(module, QuantizedLinear)
        ),
        lossy_in_model_dtype=tuple(
            name for name, layer in layers.items() if is_half and is_lossy_in_half(layer.quantized_weight)
        ),
        has_sentinels=True,
        stacks=tuple(quantized_stacks(model)),
        embeddings=tuple(quantized_embeddings(model)),
    )


def _compute_dtypes(model: nn.Module, layers: Mapping[str, QuantizedStorage]) -> tuple[str | None, dict[str, str]]:
    """The layers' compute dtype, None for the model's, and that of the layers that have another one than the rest.

    A reader that finds none takes the model's dtype, or what the model's class keeps for a layer (``kept_dtype``).
    """
    model_dtype = model.dtype  # looked up in the whole model each time
    own = _name(model_dtype)
    dtypes = {name: _name(layer.compute_dtype) for name, layer in layers.items()}
    most = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else own
    others = {name: dtype for name, dtype in dtypes.items() if dtype != most}
    is_taken = all(kept_dtype(model, name, model_dtype) in (None, most) for name in dtypes.keys() - others.keys())
    return (None if most == own and is_taken else most), others


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
