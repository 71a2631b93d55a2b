"""SmoothQuant: large inputs made smaller, and the weights that read them larger, so that 8-bit inputs lose less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ..arguments import check_number
from ..calibration import Calibration
from ..layers.dense_types import dense_names
from .find_folds import find_folds
from .fold_inputs import FoldInputs, SeenInputs, refuse_nothing
from .folds import Fold, input_weight, move_scale
from .transform_base import Surroundings, Transform


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Transform):
    """Scales between norm layers and what reads them: ``max(abs(x)) ** alpha / max(abs(w)) ** (1 - alpha)``.

    For runtimes that quantize the inputs too, to 8 bits: outliers among them move into the weights. The model computes
    what it did. Weights of few bits become worse by it: they take AWQScales.

    Fields:
        alpha: how much of an outlier moves into the weights: 0 for none of it. The paper takes 0.5 for most models;
            0.8 was better on the one that we measured.

    Source: Xiao et al. 2022, "SmoothQuant".
    """

    alpha: float = 0.8

    name: ClassVar[str] = "smoothquant"

    def __post_init__(self) -> None:
        if self.alpha != 0:
            check_number("alpha", self.alpha, above=0.0, at_most=1.0)

    @property
    def needs_calibration(self) -> bool:
        return True

    def apply(self, model: nn.Module, surroundings: Surroundings) -> None:
        names = set(dense_names(model) if surroundings.specs is None else surroundings.specs)
        folds = [
            fold for fold in find_folds(model, surroundings.call) if fold.kind == "norm" and names & set(fold.readers)
        ]
        refuse_nothing(model, folds, self)
        found = _Largest(model, folds, names, self.alpha)
        found.gather(model, cast(Calibration, surroundings.calibration), surroundings)
        for fold in folds:
            if fold.source in found.scales:
                move_scale(model, fold, found.scales[fold.source])


def smoothing_scale(largest_inputs: Tensor, largest_weights: Tensor, alpha: float) -> Tensor:
    """Of each channel (n_channels,) the scale that divides its inputs; one where either is never anything but zero."""
    x, w = largest_inputs.double(), largest_weights.double()
    scale = x**alpha / w.clamp(min=torch.finfo(torch.float32).tiny) ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), scale, torch.ones_like(scale))


class _Largest(FoldInputs):
    """Finds the scale of each fold; changes nothing."""

    statistics = ("max_abs",)

    def __init__(self, model: nn.Module, folds: Sequence[Fold], wanted: set[str], alpha: float) -> None:
        super().__init__(folds, wanted)
        self.model, self.alpha = model, alpha
        self.scales: dict[str, Tensor] = {}

    def decide(self, fold: Fold, seen: SeenInputs) -> None:
        """Find the scale of ``fold``."""
        inputs = torch.stack([cast(Tensor, each.max_abs) for each in seen.values()]).amax(0)
        weights = torch.stack([_column_maxima(input_weight(self.model, name)).to(inputs.device) for name in seen])
        self.scales[fold.source] = smoothing_scale(inputs, weights.amax(0), self.alpha)


def _column_maxima(weight: Tensor) -> Tensor:
    """The largest ``abs(weight)`` of each input, (in_features,) float32."""
    return weight.flatten(0, -2).abs().amax(0).float()
