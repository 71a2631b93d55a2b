"""Compare the results of the benchmarks in two checkouts, row by row.

Run each benchmark in both checkouts at the same time, on one core each (``--one-thread``, which counts CPU time), so
that whatever else the machine does slows both. Then ``python benchmarks/compare.py BEFORE AFTER`` with their
``benchmarks/results`` folders. Rows of float peers, which did not change, tell how much of a difference is noise.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

BENCHMARKS = ("quantize", "decode", "lora_step", "calibration")
# What tells one row from another, and the first of the times that it has.
KEYS = ("made_by", "method", "model", "name", "shape", "nbits", "axis", "batch", "tokens")
TIMES = ("median_s", "quantize_s")
RESULTS = Path(__file__).parent / "results"


def seconds_by_row(file: Path) -> dict[str, float]:
    rows = json.loads(file.read_text())["rows"]
    return {
        ", ".join(f"{key} {_text(row[key])}" for key in KEYS if key in row): next(
            filter(None, map(row.get, TIMES)), None
        )
        for row in rows
    }


def _text(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, list) else str(value)


def compared(before: Path, after: Path, benchmark: str) -> list[dict[str, Any]]:
    old, new = (seconds_by_row(folder / f"{benchmark}.json") for folder in (before, after))
    return [
        {"row": row, "before_s": old[row], "after_s": seconds, "after_over_before": seconds / old[row]}
        for row, seconds in new.items()
        if seconds and old.get(row) not in (None, seconds)  # the very same time was carried over from an earlier run
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="benchmarks/results of the older checkout")
    parser.add_argument("after", type=Path, help="benchmarks/results of the newer one")
    parser.add_argument("--write", help="name of a result file to write")
    args = parser.parse_args()
    result = {}
    for benchmark in BENCHMARKS:
        rows = compared(args.before, args.after, benchmark)
        result[benchmark] = rows
        for row in rows:
            print(f"{benchmark:12} {row['row']:70} {1e3 * row['before_s']:10.3f} -> {1e3 * row['after_s']:10.3f} ms")
        ratios = [row["after_over_before"] for row in rows]
        print(f"{benchmark}: after / before, median of {len(ratios)} rows: {statistics.median(ratios):.3f}\n")
    if args.write:
        device = json.loads((args.after / f"{BENCHMARKS[0]}.json").read_text())["device"]
        (RESULTS / f"{args.write}.json").write_text(json.dumps({"device": device} | result, indent=2) + "\n")


if __name__ == "__main__":
    main()
