"""Tune the scales of merged layers, all together, until the merged model predicts what the unmerged one did."""

from __future__ import annotations

import dataclasses

from ..layers import QuantizedLinear
from ..merging.strategies import STRATEGIES
from ..scales import Predictions, record_predictions
from ..scales.tune_scales import DEFAULT_ROLES, tuned
from .prepared_merge import PreparedMerge


def unmerged_predictions(merge: PreparedMerge) -> Predictions | None:
    """What the model with its adapters predicts, window by window: each is a step of the tuning. None without one."""
    if merge.calibration is None or not merge.tune_epochs:
        return None
    with merge.only_its_adapters():
        return record_predictions(
            merge.peft_model, dataclasses.replace(merge.calibration, batch_size=1), progress=merge.progress
        )


def tune_merged(merge: PreparedMerge, predictions: Predictions | None) -> None:
    """Train scales and codebooks of the linear layers whose merge has rounded something; their reports are made again.

    What the reports said of outputs is of the weights before, so it is dropped; ``evaluate_on`` measures it again.
    Nothing is done without ``predictions``.
    """
    if predictions is None or merge.calibration is None:
        return
    changed = [
        target.source
        for target in merge.targets
        if isinstance(target.source.current_base(), QuantizedLinear)
        and target.source.merge_report is not None
        and STRATEGIES[target.source.merge_report.strategy].adds_noise
    ]
    if not changed:
        return
    with merge.only_its_adapters():
        result = tuned(
            merge.base_model,
            [source.quantized_base() for source in changed],
            predictions,
            train=DEFAULT_ROLES,
            epochs=merge.tune_epochs,
            learning_rate=merge.calibration.learning_rate,
            progress=merge.progress,
        )
        if result.is_kept:
            for source in changed:
                source.refresh_report()
