"""Places in a model where a scale moves from what one module gives to the weights that read it, and the move itself.

A module's outputs are divided by a scale for each channel, and the columns of every weight that reads them are
multiplied by it: the model computes what it did. Nothing is looked for here; see :mod:`.find_folds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..layers.dense_types import dense_type_of
from ..layers.expert_types import find_stack

Kind = Literal["norm", "linear"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fold:
    """One place where a scale can move.

    Fields:
        kind: whether the outputs are those of a norm layer or of a linear layer.
        source: name of that module.
        readers: names of the modules, and of fused weights of experts, that read these outputs and nothing else.
        n_channels: number of scales.
        norm_offset: what the norm adds to its weight: 1 where the weight is stored as the gain less one (Gemma).
        rows: of a linear source, the row that each scale divides, (n_channels,) int64; None for all in their order.
        index: for each input of the readers the scale that multiplies it, (in_features,) int64; None for all in their
            order. In grouped-query attention several heads share the scales of one.
        head_dim: of values that an attention mixes over tokens, the channels that one head mixes alike; 0 elsewhere.
    """

    kind: Kind
    source: str
    readers: tuple[str, ...]
    n_channels: int
    norm_offset: float = 0.0
    rows: Tensor | None = None
    index: Tensor | None = None
    head_dim: int = 0

    def for_readers(self, per_channel: Tensor) -> Tensor:
        """Values (n_channels,) as the readers' inputs have them, (in_features,)."""
        return per_channel if self.index is None else per_channel[self.index.to(per_channel.device)]

    def per_channel(self, per_input: Tensor) -> Tensor:
        """Means over the readers' inputs (in_features,) that share a scale, (n_channels,)."""
        if self.index is None:
            return per_input
        index = self.index.to(per_input.device)
        total = per_input.new_zeros(self.n_channels).index_add_(0, index, per_input)
        return total / torch.bincount(index, minlength=self.n_channels)

    def source_tensors(self, model: nn.Module) -> list[Tensor]:
        """Weight and bias of the source whose first axis, rows taken, are the channels."""
        module: Any = model.get_submodule(self.source)
        entry = dense_type_of(module)
        weight = module.weight if self.kind == "norm" or entry is None else entry.weight(module)
        bias = getattr(module, "bias", None)
        return [weight.detach()] + ([] if bias is None else [bias.detach()])

    def reader_tensors(self, model: nn.Module) -> list[Tensor]:
        """The weights of the readers, (..., out_features, in_features): the model's own tensors, or views."""
        return [input_weight(model, name) for name in self.readers]


def input_weight(model: nn.Module, name: str) -> Tensor:
    """The weight of a reader whose last axis are its inputs: the model's own tensor, or a view of it."""
    stack = find_stack(model, name)
    if stack is not None:
        return stack[1].weight(stack[0]).detach()
    module = model.get_submodule(name)
    entry = dense_type_of(module)
    return (cast(Tensor, module.weight) if entry is None else entry.weight(module)).detach()


def matrices(weight: Tensor) -> Iterable[Tensor]:
    """Views (out_features, in_features) of a weight or of a stack of them: one at a time is in memory in float64."""
    return weight if weight.dim() == 3 else [weight]


@torch.no_grad()
def move_scale(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """Divide the outputs of the fold's source by ``scale`` (n_channels,), and make up for it in the readers.

    In float64, each tensor rounded once to its own dtype.
    """
    divide_source(model, fold, scale)
    for weight in fold.reader_tensors(model):
        for part in matrices(weight):
            part.copy_(part.double() * fold.for_readers(scale.double()).to(part.device))


def divide_source(model: nn.Module, fold: Fold, scale: Tensor) -> None:
    """The half of :func:`move_scale` that changes the source."""
    for position, tensor in enumerate(fold.source_tensors(model)):
        offset = fold.norm_offset if fold.kind == "norm" and position == 0 else 0.0
        divisor = scale.double().to(tensor.device)
        if tensor.dim() == 2:
            divisor = divisor[:, None]
        if fold.rows is None:
            tensor.copy_((tensor.double() + offset) / divisor - offset)
        else:
            rows = fold.rows.to(tensor.device)
            tensor[rows] = (tensor[rows].double() / divisor).to(tensor.dtype)


@contextmanager
def restored(tensors: list[Tensor]) -> Iterator[None]:
    """Put ``tensors`` back as they were in the end, to the bit."""
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, before in zip(tensors, kept, strict=True):
            tensor.copy_(before)
