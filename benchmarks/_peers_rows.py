"""The tables of quantizers side by side, from the results of ``bench_peers.py`` and ``bench_calibration.py``."""

from typing import Any

NAMES = {
    "ours": "**ours**, HQQ calibrated",
    "ours-plain": "**ours**, HQQ",
    "ours-mixed": "**ours**, HQQ calibrated, mixed bits",
    "ours-best": "**ours**, HQQ calibrated, mixed bits, 8-bit metadata",
    "ours-finetuned": "**ours**, HQQ calibrated, mixed bits, 8-bit metadata, finetuned",
    "ours-aqlm": "**ours**, AQLM 2x8 calibrated",
    "llmcompressor-gptq": "llm-compressor, GPTQ",
    "llmcompressor-awq": "llm-compressor, AWQ",
    "gptqmodel": "GPTQModel, GPTQ",
    "gptqmodel-gptaq": "GPTQModel, GPTAQ",
    "auto-round": "AutoRound",
    "auto-round-full": "AutoRound",
    "bitsandbytes-nf4": "bitsandbytes NF4",
    "bitsandbytes-nf4-double": "bitsandbytes NF4",
    "torchao": "torchao",
    "torchao-hqq": "torchao",
    "quanto": "optimum-quanto",
}
# By the names of their rows there, who made them and the number of bits.
OF_CALIBRATION = {
    **{f"HQQ {bits} bits, group 64, calibrated": ("ours", bits) for bits in (4, 3, 2)},
    **{f"HQQ mixed bits, {bits} on average, group 64, calibrated": ("ours-mixed", bits) for bits in (3, 2)},
    **{f"HQQ best at {bits}.5 bits per weight, calibrated": ("ours-best", bits) for bits in (4, 3, 2)},
    "AQLM 2x8, calibrated": ("ours-aqlm", 2),
}
# Quantizers that read no text, and those whose groups are of another kind, or chosen by themselves.
WITHOUT_TEXT = ("ours-plain", "bitsandbytes-nf4", "bitsandbytes-nf4-double", "torchao", "torchao-hqq", "quanto")
OTHER_GROUPS = ("quanto", "ours-best", "ours-finetuned", "ours-aqlm")

HEAD = [
    "bits",
    "quantizer",
    "bits per weight",
    "perplexity",
    "KL",
    "second text",
    "KL there",
    "CPU minutes",
    "peak MiB",
]
ENCODER_HEAD = ["bits", "quantizer", "bits per weight", "1 - cosine", "second text", "CPU minutes", "peak MiB"]
MARK = "¹"
SCORES = ("perplexity", "kl_to_float", "perplexity_second_text", "kl_to_float_second_text")
ENCODER_SCORES = ("cosine_distance", "cosine_distance_second_text")


def of_calibration(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``bench_calibration.py`` as rows of ``bench_peers.py``; their memory was not measured."""
    found = [(*OF_CALIBRATION[row["name"]], row) for row in measured["rows"] if row["name"] in OF_CALIBRATION]
    return [
        {
            **row,
            "maker": maker,
            "bits": bits,
            "group_size": 48 if maker == "ours-best" else 64,
            "cpu_s": row["quantize_cpu_s"],
        }
        for maker, bits, row in found
        if "kl_to_float_second_text" in row
    ]


def with_rows_from_elsewhere(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """``rows``, and those of ``others`` that are not among them."""
    known = {(row["maker"], row["bits"], row["group_size"]) for row in rows}
    return [*rows, *(row for row in others if (row["maker"], row["bits"], row["group_size"]) not in known)]


def peers_rows(rows: list[dict[str, Any]], scores: tuple[str, ...], processor: str) -> list[list[str]]:
    """Cells, by bits and then by KL (or by cosine); CPU minutes on another processor than ``processor`` are marked."""
    by_score = sorted(rows, key=lambda row: (-row["bits"], row[scores[-1]]))
    return [_cells(row, scores, processor) for row in by_score]


def other_processors(rows: list[dict[str, Any]], processor: str, mark: str = MARK) -> str:
    """What ``mark`` stands for; empty where all ran on ``processor``."""
    names = sorted({row["cpu"] for row in rows} - {processor})
    return f" {mark} On {' and '.join(names)}." if names else ""


def peers_versions(rows: list[dict[str, Any]]) -> str:
    """Of the others' packages, and of transformers where they need another one."""
    found: dict[str, set[str]] = {}
    for row in rows:
        package, *_ = row["versions"]
        if package != "peft_quantlayers":
            own = f" (transformers {row['versions']['transformers']})"
            found.setdefault(package, set()).add(row["versions"][package] + own)
    return ", ".join(f"{name} {' and '.join(sorted(each))}" for name, each in sorted(found.items()))


def _cells(row: dict[str, Any], scores: tuple[str, ...], processor: str) -> list[str]:
    maker = row["maker"]
    name = NAMES[maker]
    if maker not in OTHER_GROUPS:
        name += f", group {row['group_size']}"
    if row.get("options"):
        name += f", {row['options']}"
    if maker in WITHOUT_TEXT:
        name += ", no text"
    return [
        str(row["bits"]),
        name,
        f"{row['bits_per_weight']:.2f}",
        *(_score(row[score], score) for score in scores),
        f"{row['cpu_s'] / 60:.1f}" + f" {MARK}" * (row["cpu"] != processor),
        f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "",
    ]


def _score(value: float, kind: str) -> str:
    if kind.startswith("perplexity"):
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:.4f}" if kind.startswith("cosine") else f"{value:.3f}"
