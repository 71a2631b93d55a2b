"""Tune the scales of merged layers, all together, until the merged model predicts what the unmerged one did."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from peft import PeftModel

from ..calibration import Calibration
from ..layers import QuantizedLinear
from ..merging.advice import WITHOUT_NOISE
from ..scales import Predictions, record_predictions
from ..scales.tune_scales import DEFAULT_ROLES, tuned
from .active_adapters import only_active
from .targets import MergeTarget


def unmerged_predictions(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    names: list[str],
    calibration: Calibration,
    *,
    progress: bool,
) -> Predictions:
    """What the model with its adapters ``names`` predicts, window by window: each is a step of the tuning."""
    with only_active(peft_model, targets, names):
        return record_predictions(peft_model, dataclasses.replace(calibration, batch_size=1), progress=progress)


def tune_merged(
    peft_model: PeftModel,
    targets: Sequence[MergeTarget],
    predictions: Predictions,
    *,
    epochs: int,
    learning_rate: float,
    progress: bool,
) -> None:
    """Train scales and codebooks of the layers whose merge has rounded something; their reports are made again.

    What the reports said of outputs is of the weights before, so it is dropped; ``evaluate_on`` measures it again.
    """
    changed = [
        target.source
        for target in targets
        if isinstance(target.source.current_base(), QuantizedLinear)
        and target.source.merging.report is not None
        and target.source.merging.report.strategy not in WITHOUT_NOISE
    ]
    if not changed:
        return
    result = tuned(
        peft_model.get_base_model(),
        [source.quantized_base() for source in changed],
        predictions,
        train=DEFAULT_ROLES,
        epochs=epochs,
        learning_rate=learning_rate,
        progress=progress,
    )
    if result.is_kept:
        for source in changed:
            source.refresh_report()
