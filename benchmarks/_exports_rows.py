"""The table of ``docs/exports.md`` from what ``exports_table.py`` measured."""

from collections.abc import Mapping
from typing import Any

HEAD = [
    "model", "format", "bits / group, zeros", "exact", "read by", "max logit difference", "KL", "MB", "serve it with",
]  # fmt: skip

# What reads the formats whose engines run on GPUs, or with another version of transformers.
_IN_TESTS = {
    "humming": "humming's own schema, and decoded from its specification, in the tests",
    "hqq": "the hqq package, in the tests",
    "aqlm": "our own reader, in the tests",
    "awq": "decoded from its specification, in the tests",
    "gptq": "decoded from its specification, in the tests",
}


def exports_rows(measured: Mapping[str, Any]) -> list[list[str]]:
    """One row for each case, as text; those of a model together, in the order in which it was first measured."""
    models = list(dict.fromkeys(row["model"] for row in measured["rows"].values()))
    rows = sorted(measured["rows"].values(), key=lambda row: models.index(row["model"]))
    return [_row(row) for row in rows]


def _row(row: Mapping[str, Any]) -> list[str]:
    options = row["options"]
    said = [options[name] for name in ("approximate", "dtype") if name in options]
    said += ["with an adapter"] if row.get("has_adapter") else []
    format_name = f"`{row['format']}`" + (f" ({', '.join(said)})" if said else "")
    grid = f"{row['nbits']} / {row['group_size']}, {row['zeros']}"
    if "mb" not in row:
        return [row["model"], format_name, grid, "refused: " + row["refused"], "", "", "", "", ""]
    exact = "yes" if row["is_exact"] else f"no: {row['relative_error']:.1%} of the weights"
    reader = row.get("reader") or _IN_TESTS[row["format"]]
    if "refused" in row:
        reader += f" refuses: {row['refused']}"
    megabytes = f"{row['mb']:.1f}" if row["mb"] else ""
    has_logits = "kl" in row
    difference = f"{row['max_logit_difference']:.1e}" if has_logits else ""
    kl = f"{row['kl']:.1e}" if has_logits else ""
    return [
        row["model"], format_name, grid, exact, reader, difference, kl, megabytes, f"`{row['command']}`",
    ]  # fmt: skip
