"""The table of ``docs/exports.md`` from what ``exports_table.py`` measured."""

from collections.abc import Mapping
from typing import Any

HEAD = [
    "model", "format", "bits / group, zeros", "exact", "read by", "max logit difference", "KL", "MB", "serve it with",
]  # fmt: skip


def exports_rows(measured: Mapping[str, Any]) -> list[list[str]]:
    """One row for each case, as text."""
    return [_row(row) for row in measured["rows"].values()]


def _row(row: Mapping[str, Any]) -> list[str]:
    options = row["options"]
    said = [options[name] for name in ("approximate", "dtype") if name in options]
    format_name = f"`{row['format']}`" + (f" ({', '.join(said)})" if said else "")
    grid = f"{row['nbits']} / {row['group_size']}, {row['zeros']}"
    if "mb" not in row:
        return [row["model"], format_name, grid, "refused: " + row["refused"], "", "", "", "", ""]
    exact = "yes" if row["is_exact"] else f"no: {row['relative_error']:.1%} of the weights"
    reader = row.get("reader") or "decoded from the specification in the tests"
    if "refused" in row:
        reader += f" refuses: {row['refused']}"
    has_logits = "kl" in row
    difference = f"{row['max_logit_difference']:.1e}" if has_logits else ""
    kl = f"{row['kl']:.1e}" if has_logits else ""
    return [
        row["model"], format_name, grid, exact, reader, difference, kl, f"{row['mb']:.1f}", f"`{row['command']}`",
    ]  # fmt: skip
