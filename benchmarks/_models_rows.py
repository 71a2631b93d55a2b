"""The table of ``docs/models.md`` from the results of ``models_table.py``."""

from typing import Any

# Steps of a journey that have a column, and the head of that.
COMPARED = {
    "while loading": "while loading",
    "saved and loaded": "saved, loaded",
    "LoRA step": "LoRA step",
    "merge": "merge",
}
EQUAL, DIFFERENT, NOT_RUN = "yes", "**no**", "—"
# Reasons with less are left out of the table, as a fraction of the parameters.
SHOWN_FRACTION = 0.005

HEAD = ["class", "quantized", "fitted layers", "stays dense", "in memory", *COMPARED.values(), "outputs compared on"]


def models_summary(measured: dict[str, Any]) -> str:
    rows = measured["rows"]
    made = [row for row in rows if _can_be_compared(row)]
    equal = [row for row in made if not any(row.get(step) for step in ("in memory", *COMPARED))]
    with_outputs = [row for row in made if row["inputs"]]
    return (
        f"Of the {measured['classes']} classes, {len(rows)} were tried and {len(made)} can be built, saved and loaded "
        f"as float models. {len(equal)} of these go all the way without a difference or an error; "
        f"{len(made) - len(equal)} do not, and are listed below. The tensors of all were compared, and the outputs of "
        f"{len(with_outputs)}."
    )


def models_rows(measured: dict[str, Any]) -> list[list[str]]:
    return [_cells(row) for row in measured["rows"] if _can_be_compared(row)]


def models_differences(measured: dict[str, Any]) -> list[str]:
    """A line for each step that is not right."""
    return [
        f"- {row['class']}, {step}: {_plain(row[step])}"
        for row in measured["rows"]
        for step in ("in memory", *COMPARED)
        if _can_be_compared(row) and row.get(step)
    ]


def models_left_out(measured: dict[str, Any]) -> list[str]:
    """A line for each class of which there is no tiny model, or none that transformers saves and loads."""
    return [
        f"- {row['class']}: {_plain(row.get('build') or row.get('float') or '')}"
        for row in measured["rows"]
        if not _can_be_compared(row)
    ]


def _can_be_compared(row: dict[str, Any]) -> bool:
    return "build" not in row and not row["float"]


def _cells(row: dict[str, Any]) -> list[str]:
    size = row["full size"]
    is_tiny = "error" in size
    if is_tiny:
        size = row
    if "fraction" not in size:
        shares = ["", "", ""]
    else:
        dense = [f"{label} {share:.1%}" for label, (_, share, _) in size["dense"].items() if share >= SHOWN_FRACTION]
        fitted = "" if is_tiny else str(size["fitted"] or "")
        shares = [f"{size['fraction']:.1%}" + (" (tiny)" if is_tiny else ""), fitted, ", ".join(dense)]
    states = [_state(row, step) for step in ("in memory", *COMPARED)]
    return [row["class"], *shares, *states, row.get("inputs") or "—"]


def _state(row: dict[str, Any], step: str) -> str:
    if row.get(step) is None:
        return NOT_RUN
    if row[step].startswith("as on the float model"):
        return "as float"
    return DIFFERENT if row[step] else EQUAL


def _plain(text: str) -> str:
    """An error's text as Markdown that shows it as it is."""
    return "`" + text.replace("`", "'") + "`"
