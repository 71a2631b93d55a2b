"""The part of a report on a merge: what of the adapter is in each layer, from the report that the merge saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .html_page import folded, heading, note, table
from .svg_plots import heat_map, is_in_blocks, svg

MERGE_FILE = "merge_report.json"
N_WORST = 10
COLUMNS = (
    "name", "strategy", "bits_before", "bits_after", "relative_error", "delta_retained", "output_retained",
    "output_noise",
)  # fmt: skip
HEAD = (
    "layer", "strategy", "bits before", "after", "relative error", "delta retained", "output retained",
    "noise in outputs",
)  # fmt: skip


def merge_parts(file: Path) -> list[str]:
    """HTML of the merge whose report is in ``file``.

    Raises:
        ValueError: the file is not what ``MergeReport.save`` writes.
    """
    try:
        report: dict[str, Any] = json.loads(file.read_text())
        layers: list[dict[str, Any]] = report["layers"]
        totals = _totals(report)
        retained, what = _retained(layers)
        noise = {each["name"]: each["error_norm"] / (each["delta_norm"] or 1.0) for each in layers}
        rows = [[each[column] for column in COLUMNS] for each in layers]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no report of a merge: {type(error).__name__} {error}.") from None
    parts = [heading("Merge"), table(("", "value"), totals)]
    parts += [note(report[name]) for name in ("recommendation", "not_measured") if report.get(name)]
    if is_in_blocks(retained):
        text = f"Fraction of the delta in each layer's {what} that is left: 1 is all of it, 0 none."
        parts += [heading("Fraction retained", 3), note(text), svg(heat_map(retained, label="fraction retained"))]
        text = "Norm of the rounding error over the norm of the delta: above 1 the noise is larger than the adapter."
        parts += [heading("Noise", 3), note(text), svg(heat_map(noise, label="error / delta"))]
    worst = sorted(rows, key=lambda row: retained.get(row[0], 1.0))[:N_WORST]
    if worst:
        parts += [heading("The layers that lost most", 3), table(HEAD, worst)]
    return [*parts, folded("every layer", table(HEAD, rows))]


def _retained(layers: list[dict[str, Any]]) -> tuple[dict[str, float], str]:
    """The fraction retained by name, of the outputs if all layers have it, and of what it is."""
    key = "output_retained" if all(each["output_retained"] is not None for each in layers) else "delta_retained"
    return {each["name"]: each[key] for each in layers}, "outputs" if key == "output_retained" else "weight"


def _totals(report: dict[str, Any]) -> list[tuple[str, object]]:
    names = ("strategy", "bits_before", "bits_after", "relative_error", "delta_retained", "output_retained")
    rows: list[tuple[str, object]] = [(name.replace("_", " "), report[name]) for name in names]
    capture = report["capture"] or {}
    rows += [(name.replace("_", " "), value) for name, value in capture.items()]
    scores = report["scores"] or {}
    return rows + [(f"score, {name}", value) for name, value in scores.items()]
