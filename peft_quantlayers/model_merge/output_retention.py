"""How much of an adapter's delta of each layer's outputs a merge retains, on the inputs of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import QuantizedLinear
from ..merging import Snapshot
from .merge_targets import MergeTarget


class OutputRetention:
    """Sums over a layer's outputs, from which :attr:`retained` and :attr:`noise` follow."""

    def __init__(self) -> None:
        self.energy = self.moved = self.missed = 0.0
        self.is_measured = False

    def add(self, base: Tensor, adapter: Tensor, merged: Tensor) -> None:
        """Add the outputs of the layer without adapter, with it, and merged, for the same inputs."""
        base, adapter, merged = base.float(), adapter.float(), merged.float()
        self.is_measured = True
        delta = adapter - base
        self.energy += float(delta.square().sum())
        self.moved += float(((merged - base) * delta).sum())
        self.missed += float((merged - adapter).square().sum())

    @property
    def retained(self) -> float:
        """The coefficient of the adapter's delta in that of the merged layer, by least squares; 1 without a delta."""
        return self.moved / self.energy if self.energy else 1.0

    @property
    def noise(self) -> float:
        """Norm of all other differences, over that of the adapter's delta."""
        if not self.energy:
            return 0.0
        return math.sqrt(max(0.0, self.missed / self.energy - (1.0 - self.retained) ** 2))


@contextmanager
def watched(layers: Iterable[tuple[MergeTarget, Snapshot, OutputRetention]]) -> Iterator[None]:
    """In each layer's forward pass, record its outputs with the adapters, without them, and merged.

    The layers do not change: outputs of the base and of the merged layer are computed from their weights.

    Args:
        layers: each unmerged, with the snapshot in which it is merged, and the sums for its outputs.
    """

    def hook_of(merged: Snapshot, retention: OutputRetention) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            retention.add(module.base_layer(args[0]), output, _output_in(merged, args[0]))

        return hook

    handles = [
        target.module.register_forward_hook(hook_of(merged, retention))
        for target, merged, retention in layers
        if target.source.measures_outputs
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_in(snapshot: Snapshot, x: Tensor) -> Tensor:
    """The output of the layer under the adapters for ``x``, in a snapshot."""
    base = snapshot.base
    if snapshot.weight is not None and isinstance(base, QuantizedLinear):
        return base.forward_with(x, snapshot.weight, snapshot.tensors.get("bias"))
    if isinstance(base, nn.Linear):  # dense: its weight is in the module
        return base(x)
    return torch.func.functional_call(base, snapshot.tensors, (x,))
