"""What stops a program that loads a model of ours without this package.

transformers skips a ``quant_method`` that it does not know with a warning, takes the model for a dense one, and fills
the weights that it does not find with random numbers. So each quantized layer, linear or stack of experts, has a
tensor of that weight's name and another shape in the file, a sentinel, which transformers refuses to load. Our own
loader ignores it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..formats import QuantSpec
from ..formats.checkpoint import SENTINEL_SHAPE
from ..layers.quantized_layers import replaced_parameters
from .checkpoint_headers import CheckpointFiles
from .checkpoint_names import CheckpointNames
from .tensor_conversion import ignore_tensors


def sentinels(model: nn.Module) -> dict[str, Tensor]:
    """The sentinel of each quantized layer of ``model``, by its name in a state dict."""
    return {
        name: torch.zeros(SENTINEL_SHAPE, dtype=layer.compute_dtype)  # no two share their memory
        for name, layer in replaced_parameters(model).items()
    }


def without_sentinels(
    parameters: Mapping[str, str], files: CheckpointFiles, specs: Mapping[str, QuantSpec]
) -> dict[str, str]:
    """``parameters``, the parameter of the model for each name in ``files``, less the sentinels of the layers."""
    layers = {*specs, *(f"{name}.weight" for name in specs)}
    return {
        key: parameter
        for key, parameter in parameters.items()
        if parameter not in layers or files.headers[key].shape != SENTINEL_SHAPE
    }


def ignore_sentinels(model: nn.Module, keys: set[str], names: CheckpointNames) -> None:
    """Keep transformers from reporting the sentinels ``keys``, names in files, as unexpected."""
    # One pattern for all blocks of a list: a layer that is dense in one of them is expected there.
    patterns = {re.sub(r"\d+", r"\\d+", re.escape(name)) for name in names.renamed(keys).values()}
    ignore_tensors(model, patterns)
