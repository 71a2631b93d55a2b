"""The part of a report on a training run: curves of what the Trainer logged, and the adapter that came of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .html_page import heading, note, table
from .svg_plots import curves, heat_map, is_in_blocks, small_curves, svg

STATE_FILE = "trainer_state.json"
ADAPTER_FILE = "adapter_model.safetensors"
LOSSES = ("loss", "eval_loss")
# Entries of a log that are no measurement of a step.
NOT_PLOTTED = {"step", "epoch", "total_flos", "num_tokens"}


def checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in ``folder`` that are complete, the newest first. Its state is written last."""
    steps = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if _is_complete(path)}
    return [steps[step] for step in sorted(steps, reverse=True)]


def find_trainer_state(folder: Path) -> Path | None:
    """The file of the Trainer's state in ``folder``, else in its newest checkpoint; None where there is none."""
    files = [path / STATE_FILE for path in (folder, *checkpoints(folder))]
    return next((file for file in files if file.is_file()), None)


def training_parts(state_file: Path) -> list[str]:
    """HTML of the run whose state is in ``state_file``.

    Raises:
        ValueError: the file is not what a Trainer writes.
    """
    try:
        state: dict[str, Any] = json.loads(state_file.read_text())
        series = logged_series(state["log_history"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{state_file} is no state of a Trainer: {type(error).__name__} {error}.") from None
    parts = [heading("Training"), note(f"{state.get('global_step', 0)} of {state.get('max_steps', 0)} steps.")]
    losses = {name: series[name] for name in LOSSES if name in series}
    if losses:
        parts.append(svg(curves(losses, label="loss")))
    others = {name: points for name, points in series.items() if name not in LOSSES and len(points) > 1}
    if others:
        parts.append(svg(small_curves(others)))
    finals = {name: points[-1][1] for name, points in series.items()}
    return [*parts, table(("last logged", "value"), list(finals.items()))]


def logged_series(log: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """The points (step, number) of all that a Trainer logged more than once or at its end, by name."""
    series: dict[str, list[tuple[float, float]]] = {}
    for entry in log:
        for name, value in entry.items():
            if name not in NOT_PLOTTED and isinstance(value, int | float):
                series.setdefault(name, []).append((float(entry["step"]), float(value)))
    return series


def adapter_parts(folder: Path) -> list[str]:
    """HTML of the LoRA adapter in ``folder``: how large the product of its factors is in each layer.

    Raises:
        ValueError: its file is damaged.
    """
    file = folder / ADAPTER_FILE
    if not file.is_file():
        return []
    try:
        with safe_open(file, "pt") as opened:
            factors = {name: opened.get_tensor(name) for name in opened.keys() if "lora_" in name}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}). Copy or download it again.") from None
    norms = {name: norm for name, norm in delta_norms(factors).items() if math.isfinite(norm)}
    if not is_in_blocks(norms):
        return []
    text = "Frobenius norm of B A in each layer, without its scaling: where the adapter has learned."
    return [heading("Adapter"), note(text), svg(heat_map(norms, label="norm of B A"))]


def delta_norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of ``B @ A`` for each pair of LoRA's factors, by the name of its layer without what PEFT adds."""
    found = {}
    for name, tensor in tensors.items():
        is_pair = re.fullmatch(r"(?:base_model\.model\.)?(.*)\.lora_A(\..*)?\.weight", name)
        other = tensors.get(name.replace(".lora_A", ".lora_B"))
        if is_pair and other is not None and tensor.dim() == other.dim() == 2:
            a, b = tensor.float(), other.float()
            # tr(A.T B.T B A), by matrices of the rank's size.
            found[is_pair[1]] = float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())
    return found


def _is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text())
    except (OSError, ValueError):
        return False
    return re.fullmatch(r"checkpoint-\d+", checkpoint.name) is not None
