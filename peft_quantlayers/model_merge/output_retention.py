"""What of an adapter's change of each layer's outputs is left in the merged ones, on the inputs of a forward pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from .targets import MergeableLayer


class OutputChange:
    """Sums over a layer's outputs, from which :attr:`kept` and :attr:`noise` follow."""

    def __init__(self) -> None:
        self.energy = self.moved = self.missed = 0.0

    def add(self, base: Tensor, adapter: Tensor, merged: Tensor) -> None:
        """Take in the outputs of the layer without adapter, with it, and merged, for the same inputs."""
        base, adapter, merged = base.float(), adapter.float(), merged.float()
        change = adapter - base
        self.energy += float(change.square().sum())
        self.moved += float(((merged - base) * change).sum())
        self.missed += float((merged - adapter).square().sum())

    @property
    def kept(self) -> float:
        """The coefficient of the adapter's change in the merged layer's, by least squares; 1 without a change."""
        return self.moved / self.energy if self.energy else 1.0

    @property
    def noise(self) -> float:
        """Norm of what else changed over that of the adapter's change."""
        if not self.energy:
            return 0.0
        return math.sqrt(max(0.0, self.missed / self.energy - (1.0 - self.kept) ** 2))


@contextmanager
def watched(layers: Iterable[tuple[MergeableLayer, Any, OutputChange]]) -> Iterator[None]:
    """Take in what each layer computes in its forward pass, with its adapters and without, and when it is merged.

    Args:
        layers: each unmerged, with the state in which it is merged, and the sums that its outputs go into.
    """

    def hook_of(layer: MergeableLayer, merged: Any, change: OutputChange) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Tensor) -> None:
            unmerged, base = layer.merge_state(), module.base_layer(args[0])
            layer.restore(merged)
            change.add(base, output, module.base_layer(args[0]))
            layer.restore(unmerged)

        return hook

    handles = [module_of(layer).register_forward_hook(hook_of(layer, *rest)) for layer, *rest in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def module_of(layer: MergeableLayer) -> nn.Module:
    """The adapter layer of PEFT that merges as ``layer``."""
    return layer if isinstance(layer, nn.Module) else cast(Any, layer).layer
