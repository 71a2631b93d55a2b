"""Train an adapter, all layers together, until the quantized model with it predicts what the float model does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..arguments import check_integer, check_number
from ..calibration import Calibration
from ..lora import LoraQuantizedLinear
from ..scales import Predictions, TuningResult, record_predictions
from ..scales.tune_scales import tuned


def check_tuning(
    layers: Mapping[str, LoraQuantizedLinear],
    adapter: str,
    float_model: Any,
    teacher: Any,
    calibration: Any,
    *,
    epochs: Any,
    learning_rate: Any,
) -> None:
    """Raise TypeError or ValueError unless there is what an adapter can be tuned to, or nothing to tune."""
    check_integer("tune_epochs", epochs, at_least=0, at_most=10_000)
    check_number("learning_rate", learning_rate, above=0.0, at_most=1.0)
    if teacher is not None and not isinstance(teacher, (Predictions, str, Path)):
        raise TypeError(
            f"teacher must be the float model's Predictions or their file, got {type(teacher).__name__}. Nothing was "
            "changed."
        )
    if not epochs:
        if teacher is not None:
            raise ValueError("teacher= is for tune_epochs=, which is 0. Give both or neither. Nothing was changed.")
        return
    if teacher is None and (calibration is None or not isinstance(float_model, nn.Module)):
        raise ValueError(
            f"tune_epochs={epochs} needs what the float model predicts: give float_model as a model in memory and "
            "calibration=, or teacher=, which record_predictions(float_model, calibration) made. Nothing was changed."
        )
    for name, layer in layers.items():
        if layer.disable_adapters or list(layer.active_adapters) != [adapter]:
            raise ValueError(
                f"{name}: adapter {adapter!r} is tuned as it is used, and {list(layer.active_adapters)} are active. "
                f"Call set_adapter({adapter!r}) first. Nothing was changed."
            )


def teacher_of(float_model: Any, teacher: Any, calibration: Calibration | None, *, progress: bool) -> Predictions:
    """The predictions that are given, their file's, or those of the float model; window by window, each one a step."""
    if isinstance(teacher, Predictions):
        return teacher
    if teacher is not None:
        return Predictions.load(teacher)
    assert calibration is not None  # check_tuning
    return record_predictions(float_model, dataclasses.replace(calibration, batch_size=1), progress=progress)


def tune_adapter(
    model: nn.Module,
    layers: Mapping[str, LoraQuantizedLinear],
    adapter: str,
    predictions: Predictions,
    *,
    epochs: int,
    learning_rate: float,
    progress: bool,
) -> TuningResult:
    """Train the factors of ``adapter`` in ``layers`` of ``model`` as :func:`tune_scales` does scales.

    Source: Lee et al. 2024 (RILQ), the loss over the whole model; here the divergence of the predictions.
    """
    parts: list[Any] = [part[adapter] for layer in layers.values() for part in (layer.lora_A, layer.lora_B)]
    return tuned(
        model,
        [],
        predictions,
        train=(),
        beside=[part.weight for part in parts],
        epochs=epochs,
        learning_rate=learning_rate,
        progress=progress,
    )
