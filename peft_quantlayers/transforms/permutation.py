"""Permutations of channels, so that channels of similar size share a quantization group; fused into the weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from ..arguments import check_choice, check_flag
from .fold_inputs import FoldInputs, SeenInputs
from .folds import Fold, input_weight, matrices
from .free_channels import FreeChannels, find_free_channels, reorder
from .residual_stream import ResidualStream, find_residual_stream
from .rotation import rotatable_heads, rotate_heads, separate_head
from .transform_base import Surroundings, Transform

logger = logging.getLogger(__name__)

Measure = Literal["inputs", "weights", "both"]


@dataclass(frozen=True, kw_only=True)
class Permutation(Transform):
    """Orders of channels, the largest first, in which neighbours, and so a group, are of similar size.

    What GPTQ's act-order does with an index for each column, by reordering what makes the columns instead: the model
    computes what it did, and stores and runs as before.

    Fields:
        by: what is large: a channel's "inputs" (mean absolute value on calibration data), its "weights" (root mean
            square of its column in what reads it), or "both" (their product).
        mlp: reorder the hidden channels of each MLP, gated or not, and of each expert.
        heads: reorder the channels within each attention head's values, the same for all heads of an attention.
        residual: reorder the residual stream, one order for all blocks; embeddings and norms follow.
    """

    by: Measure = "weights"
    mlp: bool = True
    heads: bool = True
    residual: bool = True

    name: ClassVar[str] = "permutation"

    def __post_init__(self) -> None:
        check_choice("by", self.by, ("inputs", "weights", "both"))
        for flag in ("mlp", "heads", "residual"):
            check_flag(flag, getattr(self, flag))
        if not (self.mlp or self.heads or self.residual):
            raise ValueError("Permutation(mlp=False, heads=False, residual=False) reorders nothing; leave it out.")

    @property
    def needs_calibration(self) -> bool:
        return self.by != "weights"

    def apply(self, model: nn.Module, surroundings: Surroundings) -> None:
        places = find_free_channels(model, surroundings.call) if self.mlp else []
        heads = rotatable_heads(model, surroundings.call) if self.heads else []
        if not places and not heads and not self.residual:
            raise ValueError(
                f"{type(model).__name__} has no channels whose order is free: in no MLP or attention of it does a "
                "linear layer read another one channel by channel. Leave Permutation out. The model was not changed."
            )
        tie = separate_head(model) if self.residual else None
        try:
            stream = find_residual_stream(model, surroundings.call) if self.residual else None
            sizes = self._input_sizes(model, places, heads, stream, surroundings)
            for place in places:
                reorder(model, place, [_order(each) for each in self._sizes(model, place.reader, sizes)])
            for fold in heads:
                _reorder_heads(model, fold, self._sizes(model, fold.readers[0], sizes)[0])
            if stream is not None:
                stream.reorder(model, _order(self._sizes_in_stream(model, stream, sizes)))
        finally:
            if tie is not None:
                tie()
        logger.info("reordered %d MLP(s), the heads of %d attention(s)", len(places), len(heads))

    def _input_sizes(
        self,
        model: nn.Module,
        places: Sequence[FreeChannels],
        heads: Sequence[Fold],
        stream: ResidualStream | None,
        surroundings: Surroundings,
    ) -> dict[str, Tensor]:
        """Mean absolute inputs (in_features,) of each reader that the data reaches; {} where they do not count."""
        if not self.needs_calibration:
            return {}
        folds = [*(place.fold for place in places), *heads]
        if stream is not None:
            for name, readers in stream.readers.items():
                folds.append(Fold(kind="norm", source=name, readers=readers, n_channels=stream.width))
        found = _InputSizes(folds)
        found.gather(model, surroundings.calibration, surroundings)  # type: ignore[arg-type]  # needs_calibration
        return found.sizes

    def _sizes(self, model: nn.Module, reader: str, inputs: dict[str, Tensor]) -> list[Tensor]:
        """How large each channel of a reader is, (in_features,), for each of its matrices."""
        weights = [matrix.float().square().mean(0).sqrt() for matrix in matrices(input_weight(model, reader))]
        if self.by == "weights":
            return weights
        given = inputs.get(reader)
        if given is None:
            return weights
        given = given.to(weights[0].device)
        return [given if self.by == "inputs" else given * each for each in weights]

    def _sizes_in_stream(self, model: nn.Module, stream: ResidualStream, inputs: dict[str, Tensor]) -> Tensor:
        """(width,): the mean over all that read it, each relative to its own mean."""
        total = torch.zeros(stream.width, dtype=torch.float64)
        for readers in stream.readers.values():
            for reader in readers:
                for size in self._sizes(model, reader, inputs):
                    total += (size / size.mean().clamp(min=1e-30)).double().cpu()
        return total


def _order(sizes: Tensor) -> Tensor:
    """The channels from the largest to the smallest; equal ones as they were."""
    return torch.argsort(sizes, descending=True, stable=True)


def _reorder_heads(model: nn.Module, fold: Fold, sizes: Tensor) -> None:
    """One order for the channels of all heads of ``fold``, by their ``sizes`` (in_features,) in its reader."""
    order = _order(sizes.view(-1, fold.head_dim).mean(0)).cpu()
    # Products with ones and zeros in float64 are exact.
    rotate_heads(model, fold, torch.eye(fold.head_dim, dtype=torch.float64)[:, order])


class _InputSizes(FoldInputs):
    statistics = ("mean_abs",)

    def __init__(self, folds: Sequence[Fold]) -> None:
        super().__init__(folds, {name for fold in folds for name in fold.readers})
        self.sizes: dict[str, Tensor] = {}

    def decide(self, fold: Fold, seen: SeenInputs) -> None:
        for name, statistics in seen.items():
            self.sizes[name] = cast(Tensor, statistics.mean_abs)
