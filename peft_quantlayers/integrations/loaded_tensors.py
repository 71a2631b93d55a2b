"""What a loaded model must have got from its checkpoint: transformers fills what is missing with random numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers import QuantizedLinear
from ..layers.codes_parameter import is_sharded
from ..layers.quantized_layers import quantized_layers
from ..layers.stack import QuantizedStack
from .parallel_loading import check_finite_shards
from .private_transformers import is_marked_as_initialized


def check_loaded(model: PreTrainedModel, *, files: str, stored: Collection[str]) -> None:
    """Raise ValueError for what the checkpoint lacks, and for NaN and Inf in small tensors.

    Args:
        model: just loaded.
        files: the checkpoint in words.
        stored: the parameters for which there is a tensor in the files.
    """
    layers = quantized_layers(model)
    missing = [
        f"{name}.{tensor_name}"
        for name, layer in layers.items()
        for tensor_name, parameter in layer.named_parameters()
        if not is_marked_as_initialized(parameter)
    ]
    missing += [name for name in _missing(model, stored) if name not in missing]
    if missing:
        raise ValueError(
            f"{files}: the checkpoint lacks {len(missing)} tensor(s) of the model, for example {missing[:3]}: they "
            "would be random numbers. Download or save it again."
        )
    for name, layer in layers.items():
        _check_layer(name, layer, files)
    for name, tensor in _small_tensors(model):
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            raise ValueError(f"{files}: {name} holds NaN or Inf: the checkpoint is damaged.")


def _check_layer(name: str, layer: QuantizedLinear | QuantizedStack, files: str) -> None:
    if is_sharded(layer.codes):  # headers were checked; this process has some of the values
        return check_finite_shards(name, layer)
    if layer.codes.device.type == "meta":
        return None
    try:
        layer.quantized_weight.check(name)
    except ValueError as error:
        raise ValueError(f"{files}: {error}") from None
    for tensor_name, parameter in [] if layer.branch is None else layer.branch.named_parameters():
        if not torch.isfinite(parameter).all():
            raise ValueError(f"{files}: {name}.branch.{tensor_name} holds NaN or Inf: the checkpoint is damaged.")


def _small_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Norms and biases. Embeddings and heads stay unread in the file until they are used."""
    for name, parameter in model.named_parameters():
        if parameter.dim() <= 1 and parameter.is_floating_point():
            yield name, parameter


def _missing(model: PreTrainedModel, stored: Collection[str]) -> Iterator[str]:
    """Dense parameters and running statistics that nothing was loaded into, and that the checkpoint ought to have.

    A model of the class that was saved has all of them there. A model of another class may have a head, a pooler or an
    adapter of its own to train; of a numbered block and of the input embeddings it finds all or nothing.
    """
    is_saved_class = type(model).__name__ in (model.config.architectures or ())
    ignored = [re.compile(p) for p in model._keys_to_ignore_on_load_missing or ()]
    unsaved = set(model._keys_to_ignore_on_save or ())
    embeddings = model.get_input_embeddings() if _has_input_embeddings(model) else None
    own = set() if embeddings is None else {id(parameter) for parameter in embeddings.parameters()}
    blocks = Counter(block for name in stored if (block := _block(name)) is not None)
    persistent = set(model.state_dict())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if is_marked_as_initialized(tensor) or name in stored or name in unsaved or name not in persistent:
            continue
        if not tensor.is_floating_point() or any(pattern.search(name) for pattern in ignored):
            continue
        if is_saved_class or id(tensor) in own or _block(name) in blocks:
            yield name


def _block(name: str) -> str | None:
    """The list of blocks that a parameter is in: ``"model.layers"`` for ``"model.layers.3.mlp.up_proj.weight"``."""
    found = re.match(r"(.+?)\.\d+\.", name)
    return None if found is None else found.group(1)


def _has_input_embeddings(model: PreTrainedModel) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Module)
    except (NotImplementedError, AttributeError):  # of images, of audio
        return False
