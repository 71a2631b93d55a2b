"""Statistics of what the readers of each fold read, gathered in one walk through the model, which changes nothing."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence

from torch import nn

from ..calibration import Calibration, InputGroup, InputStatistics, Visitor, walk
from .folds import Fold
from .transform_base import Surroundings, Transform

SeenInputs = Mapping[str, InputStatistics]
"""Of each reader that any token reached, what it reads."""


def refuse_nothing(model: nn.Module, folds: Sequence[Fold], transform: Transform) -> None:
    """Raise ValueError, naming the class of ``model``, if no fold is left for ``transform``."""
    if not folds:
        raise ValueError(
            f"{type(model).__name__} has no place for the scales of {type(transform).__name__}: before none of the "
            "layers to quantize is a layer that could take them. Leave the transform out. The model was not changed."
        )


class FoldInputs(Visitor):
    """Calls :meth:`decide` for each fold, once all of its readers' inputs are known.

    Args:
        folds: in the order in which they run.
        wanted: names of the readers to measure; folds without any are left out.
    """

    def __init__(self, folds: Sequence[Fold], wanted: Collection[str]) -> None:
        self.fold_of = {name: fold for fold in folds for name in fold.readers if name in wanted}
        self.seen: dict[str, dict[str, InputStatistics | None]] = {}

    @abstractmethod
    def decide(self, fold: Fold, seen: SeenInputs) -> None:
        """What is done with the inputs of ``fold``; ``seen`` is not empty."""

    def visit_group(self, group: InputGroup) -> None:
        for name in group.names:
            fold = self.fold_of[name]
            seen = self.seen.setdefault(fold.source, {})
            seen[name] = group.statistics
            if all(reader in seen or reader not in self.fold_of for reader in fold.readers):
                del self.seen[fold.source]
                reached = {reader: each for reader, each in seen.items() if each is not None}
                if reached:
                    self.decide(fold, reached)

    def gather(self, model: nn.Module, calibration: Calibration, surroundings: Surroundings) -> None:
        """Walk through ``model``."""
        walk(
            model,
            list(self.fold_of),
            calibration,
            self,
            device=surroundings.device,
            progress=surroundings.progress,
        )
