"""Results of several layers for one input, computed when the first of them is called."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

logger = logging.getLogger(__name__)

# One unused result may come from an interrupted pass; a second one does not.
WASTED_BEFORE_WARNING = 2


class Waste:
    """How often the groups of a model computed results that were not used."""

    def __init__(self) -> None:
        self.n = 0

    def add(self, names: Sequence[str]) -> None:
        self.n += 1
        if self.n == WASTED_BEFORE_WARNING:
            parent = names[0].rpartition(".")[0]
            logger.warning(
                "%s are fused, but the results of some were computed and never used: these layers do not all read "
                "the same input. If that is always the case, leave out such layers, these and others: "
                "fuse_projections(model, skip=[%r, ...]).",
                ", ".join(names),
                parent.rpartition(".")[2] or parent,
            )


class _Waiting(NamedTuple):
    """What was computed for layers that have not been called yet.

    Fields:
        group: whose layers they are.
        x: the input, if it is still there.
        version: of the input's values.
        results: what was kept for each layer, by its id.
    """

    group: SharedResults
    x: weakref.ref[Tensor]
    version: int
    results: dict[int, Any]


class _Pending(threading.local):
    """One group at a time: results may hold their graph, and a pass that fails must not leave one in every layer."""

    waiting: _Waiting | None = None


_PENDING = _Pending()


class SharedResults:
    """Layers that are computed together. Copies of it are None, since it names layers and not their copies."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        names: Sequence[str],
        waste: Waste,
        when_one_is_gone: Callable[[object], None] | None = None,
    ) -> None:
        self.names = tuple(names)
        self._refs = tuple(weakref.ref(layer, when_one_is_gone) for layer in layers)
        self._waste = waste

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def layers(self) -> list[Any]:
        """Those that are still there."""
        return [layer for ref in self._refs if (layer := ref()) is not None]

    def keep(self, x: Tensor, results: dict[int, Any]) -> None:
        """Keep what was computed for the input ``x`` until the layers, given by their ids, are called."""
        _PENDING.waiting = _Waiting(self, weakref.ref(x), x._version, results)

    def found(self, layer: nn.Module, x: Tensor) -> Any:
        """What is kept for ``layer`` and this input; None if nothing is. What can no longer be used is dropped."""
        waiting = _PENDING.waiting
        if waiting is None:
            return None
        if waiting.group is self and waiting.x() is x and waiting.version == x._version:
            kept = waiting.results.pop(id(layer), None)
            if not waiting.results:
                _PENDING.waiting = None
            if kept is not None:
                return kept
        _PENDING.waiting = None
        if waiting.results:
            waiting.group._waste.add(waiting.group.names)
        return None
