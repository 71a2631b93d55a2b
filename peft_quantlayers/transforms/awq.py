"""AWQ scales: measure inputs, search the scales of each fold, and move them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..arguments import check_flag, check_integer
from ..calibration import Calibration
from ..formats import QuantSpec
from ..layers.dense_types import dense_shape
from ..methods import QuantConfig, get_method
from ..methods.quant_config import check_config
from .awq_core import Reader, best_scale, clip_limits, clipped, relative_weights, scale_candidates
from .find_folds import find_folds
from .fold_inputs import FoldInputs, SeenInputs, refuse_nothing
from .folds import Fold, input_weight, matrices, move_scale
from .transform_base import Surroundings, Transform

logger = logging.getLogger(__name__)

# Whose rounding of a weight takes minutes.
SLOW_METHOD = "aqlm"
# Of each weight, rounded for each candidate.
SEARCHED_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class AWQScales(Transform):
    """Scales for the input channels of the layers to quantize, by how large their inputs are.

    For each fold the scales of the lowest output error after rounding to the grid of the layers' config are searched;
    leaving them as they are is one candidate. The model computes what it did.

    Fields:
        n_grid: exponents that are tried, for each of AWQ's two formulas.
        clip: also clip each group's weights where that lowers the error of its outputs. The model computes something
            else then.
        grid: the config whose rounding the search uses; None for that of the layers, which has to be quick: HQQ or
            NF4. For AQLM give ``HQQConfig`` with about as many bits.
    """

    n_grid: int = 10
    clip: bool = False
    grid: QuantConfig | None = None

    name: ClassVar[str] = "awq_scales"

    def __post_init__(self) -> None:
        check_integer("n_grid", self.n_grid, at_least=1, at_most=1000)
        check_flag("clip", self.clip)
        if self.grid is not None:
            check_config("grid", self.grid)

    @property
    def needs_calibration(self) -> bool:
        return True

    @property
    def needs_config(self) -> bool:
        return True

    @property
    def is_exact(self) -> bool:
        return not self.clip

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"grid": None if self.grid is None else self.grid.to_dict()}

    def apply(self, model: nn.Module, surroundings: Surroundings) -> None:
        calibration = cast(Calibration, surroundings.calibration)
        specs = self._rounded_to(model, surroundings.specs or {})
        folds = [fold for fold in find_folds(model, surroundings.call) if specs.keys() & set(fold.readers)]
        refuse_nothing(model, folds, self)
        search = _Search(self, model, folds, specs)
        search.gather(model, calibration, surroundings)
        for fold in folds:  # in the order in which they run: clipped rows are scaled by the fold that follows
            if fold.source in search.scales:
                move_scale(model, fold, search.scales[fold.source])
                for name, limits in search.limits.get(fold.source, {}).items():
                    weight = input_weight(model, name)
                    weight.copy_(clipped(weight.float(), limits.to(weight.device)))
        search.tell()

    def _rounded_to(self, model: nn.Module, specs: Mapping[str, QuantSpec]) -> dict[str, QuantSpec]:
        """What the layers are rounded to in the search, those left out that do not fit it."""
        if self.grid is None:
            slow = next((name for name, spec in specs.items() if spec.method == SLOW_METHOD), None)
            if slow is not None:
                raise ValueError(
                    f"{slow}: AWQScales rounds each weight {2 * self.n_grid} times, which takes hours with "
                    f"{SLOW_METHOD}. Say AWQScales(grid=HQQConfig(nbits=2)) for the search. The model was not changed."
                )
            return dict(specs)
        shapes = {name: dense_shape(model, name)[-2:] for name in specs}
        found = {name: self.grid.fitted_spec(self.grid.spec_for(name), *shape) for name, shape in shapes.items()}
        return {name: spec for name, spec in found.items() if spec is not None}


class _Search(FoldInputs):
    """Finds scales while the walk shows what each layer reads; changes nothing."""

    statistics = ("second_moment", "mean_abs")

    def __init__(
        self, options: AWQScales, model: nn.Module, folds: Sequence[Fold], specs: Mapping[str, QuantSpec]
    ) -> None:
        super().__init__(folds, specs)
        self.options, self.model, self.specs = options, model, specs
        self.scales: dict[str, Tensor] = {}
        self.limits: dict[str, dict[str, Tensor]] = {}
        self.errors: dict[str, tuple[float, float]] = {}

    def decide(self, fold: Fold, seen: SeenInputs) -> None:
        """Find the scale of ``fold``."""
        readers: list[Reader] = []
        owners: list[str] = []
        for name, statistics in seen.items():
            moment = cast(Tensor, statistics.second_moment)
            weight = input_weight(self.model, name)
            for each in matrices(weight):
                rows = _some_rows(each, self.specs[name]).to(moment.device).float()
                readers.append(Reader(rows, moment, partial(_rounded, self.specs[name])))
                owners.append(name)
        mean_abs = torch.stack([cast(Tensor, each.mean_abs) for each in seen.values()]).mean(0)
        sizes = [_group_size(self.specs[name]) for name in owners]
        weights = relative_weights([reader.weight for reader in readers], sizes)
        candidates = scale_candidates(fold.per_channel(mean_abs), fold.per_channel(weights), self.options.n_grid)
        scale, error, before = best_scale(readers, candidates, fold.for_readers)
        self.scales[fold.source] = scale
        self.errors[fold.source] = (before, error)
        if self.options.clip:
            self._clip(fold, dict(zip(owners, readers, strict=True)), fold.for_readers(scale))

    def _clip(self, fold: Fold, readers: Mapping[str, Reader], scale: Tensor) -> None:
        """Find limits for the scaled weights of those readers that are no stack and have groups."""
        limits = self.limits.setdefault(fold.source, {})
        for name, reader in readers.items():
            size, weight = _group_size(self.specs[name]), input_weight(self.model, name)
            if size and weight.dim() == 2 and weight.shape[1] % size == 0:
                moment = reader.second_moment / (scale[:, None] * scale)
                scaled = weight.to(scale.device).float() * scale
                limits[name] = clip_limits(Reader(scaled, moment, reader.rounding), size)

    def tell(self) -> None:
        """Log by how much the errors became lower."""
        before, after = (sum(pair[at] for pair in self.errors.values()) for at in (0, 1))
        if before > 0:
            logger.info(
                "AWQ scales: moved at %d places; the output error of rounding to %.1f %% of what it was",
                len(self.errors),
                100 * after / before,
            )


def _group_size(spec: QuantSpec) -> int:
    """Neighbouring inputs of a row that share a scale; 0 where the whole row does."""
    return getattr(spec, "group_size", None) or getattr(spec, "block_size", None) or 0


def _some_rows(weight: Tensor, spec: QuantSpec) -> Tensor:
    """``SEARCHED_ROWS`` rows, evenly spaced, that stand for all; all of them where groups lie along the rows."""
    if getattr(spec, "axis", 1) == 0:
        return weight
    return weight[:: max(1, len(weight) // SEARCHED_ROWS)]


def _rounded(spec: QuantSpec, weight: Tensor) -> Tensor:
    method = get_method(spec.method)
    return method.dequantize(method.quantize(weight, spec), dtype=torch.float32)
