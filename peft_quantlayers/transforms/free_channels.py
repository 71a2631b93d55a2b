"""Channels between linear layers whose order is free: the rows that make them and the columns that read them.

What each hidden channel of an MLP holds depends on no other, so that any order will do, of a gated one if its gate and
its up projection follow the same. Proposed by sizes and tried on the model, as folds are: see :mod:`.find_folds`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call
from ..layers.dense_types import dense_shape
from ..layers.expert_types import dense_stacks, fused_weights
from .find_folds import is_dense, kind_of_place, shared_weights
from .folds import Fold, input_weight, matrices
from .recorded_reads import record_reads
from .scale_trials import changes_nothing, outputs_of


@dataclass(frozen=True, kw_only=True, eq=False)
class FreeChannels:
    """One place whose channels may take any order.

    Fields:
        reader: name of the layer, or fused weight of experts, whose inputs they are.
        sources: of each layer that makes them its name and the rows of each channel, (n_parts, n_channels) int64: two
            parts where gate and up are one layer.
    """

    reader: str
    sources: tuple[tuple[str, Tensor], ...]

    @property
    def n_channels(self) -> int:
        """How many they are."""
        return self.sources[0][1].shape[1]

    @property
    def fold(self) -> Fold:
        """The place as statistics of inputs name it."""
        return Fold(kind="linear", source=self.sources[0][0], readers=(self.reader,), n_channels=self.n_channels)

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """All that :func:`reorder` changes."""
        biases = [bias for name, _ in self.sources if (bias := _bias_of(model, name)) is not None]
        return [*biases, *(input_weight(model, name) for name in (self.reader, *(name for name, _ in self.sources)))]


@torch.no_grad()
def reorder(model: nn.Module, place: FreeChannels, orders: Sequence[Tensor], *, sources_only: bool = False) -> None:
    """Let channel ``i`` of ``place`` be the one that was ``order[i]``; one order (n_channels,) for each expert."""
    for name, parts in place.sources:
        for matrix, order in zip(matrices(input_weight(model, name)), orders, strict=True):
            for rows in parts.to(matrix.device):
                matrix[rows] = matrix[rows[order.to(matrix.device)]]
        if (bias := _bias_of(model, name)) is not None:
            for rows in parts.to(bias.device):
                bias[rows] = bias[rows[orders[0].to(bias.device)]]
    if not sources_only:
        for matrix, order in zip(matrices(input_weight(model, place.reader)), orders, strict=True):
            matrix.copy_(matrix[:, order.to(matrix.device)])


def find_free_channels(model: nn.Module, call: Call) -> list[FreeChannels]:
    """The places of ``model`` that ``call``, of a few tokens, reaches; the model is the same to the bit afterwards."""
    recorded, before = record_reads(model, call), outputs_of(model, call)
    kinds: dict[tuple, list[FreeChannels]] = {}
    for place in _proposals(model, recorded.layers, shared_weights(model)):
        shapes = tuple((name.rpartition(".")[2], tuple(parts[:, 1].tolist())) for name, parts in place.sources)
        kinds.setdefault((kind_of_place(model, place.fold), shapes), []).append(place)
    found: dict[str, FreeChannels] = {}
    for places in kinds.values():
        # The first and the last of a kind stand for all: blocks of one class compute the same.
        ends = places if len(places) < 3 else [places[0], places[-1]]
        if all(_is_free(model, call, place, before) for place in ends):
            for place in places:
                found.setdefault(place.reader, place)
    return list(found.values())


def _is_free(model: nn.Module, call: Call, place: FreeChannels, before: list[Tensor]) -> bool:
    n_matrices = len(list(matrices(input_weight(model, place.reader))))
    orders = [torch.randperm(place.n_channels, generator=torch.Generator().manual_seed(1))] * n_matrices
    return changes_nothing(
        model,
        call,
        place.tensors(model),
        half=lambda: reorder(model, place, orders, sources_only=True),
        whole=lambda: reorder(model, place, orders),
        before=before,
    )


def _proposals(model: nn.Module, ran: Sequence[str], shared: set[str]) -> Iterator[FreeChannels]:
    """All siblings of fitting sizes together, as gate and up are, and then each by itself."""
    dense = [name for name in ran if name not in shared and is_dense(model, name)]
    for position, reader in enumerate(dense):
        n_channels = dense_shape(model, reader)[1]
        for levels in (1, 2):  # up and down projection in one module, or each in a module of its own as BERT has them
            place = reader.split(".")[:-levels]
            siblings = [name for name in dense[:position] if name.split(".")[:-levels] == place]
            sizes = {name: dense_shape(model, name)[0] for name in siblings}
            if n_channels in sizes.values() or 2 * n_channels in sizes.values():
                yield from _of_sizes(reader, n_channels, sizes)
                break
    for name, module, _ in dense_stacks(model):
        stacks = {entry.parameter: entry.shape(module) for entry in fused_weights(module)}
        prefix = name.removesuffix(name.rpartition(".")[2])
        if name != f"{prefix}{list(stacks)[-1]}" or name in shared or f"{prefix}{next(iter(stacks))}" not in ran:
            continue
        *others, (_, shape) = stacks.items()
        yield from _of_sizes(name, shape[2], {f"{prefix}{parameter}": each[1] for parameter, each in others})


def _of_sizes(reader: str, n_channels: int, n_rows: dict[str, int]) -> Iterator[FreeChannels]:
    plain = torch.arange(n_channels)[None]
    single = [name for name, size in n_rows.items() if size == n_channels]
    if len(single) > 1:
        yield FreeChannels(reader=reader, sources=tuple((name, plain) for name in single))
    for name in single:
        yield FreeChannels(reader=reader, sources=((name, plain),))
    for name in (name for name, size in n_rows.items() if size == 2 * n_channels):
        rows = torch.arange(2 * n_channels)
        for parts in (rows.view(2, -1), rows.view(-1, 2).t()):  # gate and up after each other, or in turn
            yield FreeChannels(reader=reader, sources=((name, parts),))


def _bias_of(model: nn.Module, name: str) -> Tensor | None:
    try:
        bias = getattr(model.get_submodule(name), "bias", None)
    except AttributeError:  # a fused weight
        return None
    return bias.detach() if isinstance(bias, Tensor) else None
