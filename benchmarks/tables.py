"""Write the tables of ``docs/`` from ``benchmarks/results/*.json``.

``--check`` only tells whether they are up to date.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _exports_rows import HEAD as EXPORTS_HEAD
from _exports_rows import exports_rows
from _models_rows import HEAD as MODELS_HEAD
from _models_rows import models_differences, models_left_out, models_rows, models_summary
from _peers_rows import (
    ENCODER_HEAD,
    ENCODER_SCORES,
    MARK,
    SCORES,
    of_calibration,
    other_processors,
    peers_rows,
    peers_versions,
    with_rows_from_elsewhere,
)
from _peers_rows import HEAD as PEERS_HEAD

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def device_line(device: dict[str, Any], command: str) -> str:
    versions = ", ".join(
        f"{name} {device[name]}" for name in ("torch", "transformers", "peft", "hqq") if name in device
    )
    return f"`{command}` on {device['cpu']} ({device['threads']} threads, {device['cpu_capability']}); {versions}."


def number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def quality() -> str:
    """Perplexity and KL of each setting, ours and the peer's."""
    measured = result("quality")
    dense, *rows = measured["rows"]
    makers = list(dict.fromkeys(row["made_by"] for row in rows))
    settings = list(dict.fromkeys((row["nbits"], row["group_size"]) for row in rows))
    by_key = {(row["nbits"], row["group_size"], row["made_by"]): row for row in rows}
    body = []
    for nbits, group_size in settings:
        cells = [f"{nbits} bits, group {group_size}"]
        for maker in makers:
            row = by_key[nbits, group_size, maker]
            cells.append(f"{number(row['perplexity'])} / {row['kl_to_float']:.4f} ({row['bits_per_weight']:.2f})")
        body.append(cells)
    head = ["perplexity / KL (bits per weight)", *makers]
    return "\n".join(
        [
            table(head, body),
            "",
            f"Float model: {dense['perplexity']:.2f}. {measured['model']}; WikiText-2, {measured['windows']} windows "
            f"of {measured['window_tokens']} tokens, KL on {measured['kl_windows']}. "
            + device_line(measured["device"], "make bench-quality"),
        ]
    )


def calibration() -> str:
    """Perplexity and KL of each base and each tuning on two texts, with bits and time."""
    measured = result("calibration")
    rows, default = [], measured["shrinkage"]
    for row in measured["rows"]:
        seconds = row.get("quantize_cpu_s", row["quantize_s"])
        marks = " ¹" * (row["shrinkage"] not in (None, default)) + " ²" * (row["cpu"] != measured["device"]["cpu"])
        cells = [row["name"] + marks, f"{row['bits_per_weight']:.2f}"]
        for ending in ("", "_second_text"):
            is_scored = f"perplexity{ending}" in row
            cells.append(number(row[f"perplexity{ending}"]) if is_scored else "")
            cells.append(f"{row[f'kl_to_float{ending}']:.3f}" if is_scored else "")
        rows.append([*cells, "" if seconds is None else f"{seconds / 60:.1f}"])
    tuning = measured["tuning"]
    elsewhere = other_processors(measured["rows"], measured["device"]["cpu"], "²")
    return "\n".join(
        [
            table(["", "bits per weight", "perplexity", "KL", "second text", "KL there", "CPU minutes"], rows),
            "",
            f"Float model: {measured['float_perplexity']:.2f}, on the second text "
            f"{measured['float_perplexity_second_text']:.2f}. {measured['model']}; WikiText-2, {measured['windows']} "
            f"windows of {measured['window_tokens']} tokens, KL on {measured['kl_windows']}; second text: Python's "
            f"help topics, {measured['second_text_windows']} windows; calibration: {measured['calibration_tokens']:,} "
            f"tokens of WikiText-2's other half; tuning: {tuning['steps']} steps of "
            f"{tuning['batch']} x {tuning['tokens']} tokens of it. "
            f"¹ With shrinkage=0.3, the default before {default}.{elsewhere} "
            + device_line(measured["device"], "python benchmarks/bench_calibration.py"),
        ]
    )


def own_text() -> str:
    """KL on both texts with and without the model's own text; of those that were calibrated both ways, both."""
    known = {row["name"]: row for row in result("calibration")["rows"]}
    rows = []
    for name, row in known.items():
        if "own text" not in name:
            continue
        base, _, said = name.partition(", calibrated, ")
        said, _, tuned = said.partition(" + ")
        steps = [step for step in said.split(", ") if "own text" not in step]
        finetuned = [step for step in steps if step == "finetuned"]
        without = known.get(", ".join([base, "calibrated", *finetuned]) + (f" + {tuned}" if tuned else ""))
        scores = (
            each and each[score] for score in ("kl_to_float", "kl_to_float_second_text") for each in (without, row)
        )
        label = ", ".join([base, *steps, *([f"tuned to the {tuned}"] if tuned else [])])
        rows.append([label, *("–" if score is None else f"{score:.3f}" for score in scores)])
    return table(["", "WikiText", "WikiText, own text too", "second text", "second text, own text too"], rows)


def peers(model: str) -> str:
    """Ours and other quantizers on one model, by bits."""
    measured = result("peers")
    if model not in measured["models"]:
        raise FileNotFoundError(f"no results of {model}")
    entry = measured["models"][model]
    command = device_line(measured["device"], f"python benchmarks/bench_peers.py {model}")
    elsewhere = of_calibration(result("calibration")) if model == "smollm2" else []
    rows, processor = with_rows_from_elsewhere(entry["rows"], elsewhere), measured["device"]["cpu"]
    note = f"{entry['name']}. {peers_versions(entry['rows'])}. {command}{other_processors(rows, processor)}"
    if model == "minilm":
        return f"{table(ENCODER_HEAD, peers_rows(rows, ENCODER_SCORES, processor))}\n\n{note}"
    floats = entry["of_float"]
    of_float = f"{floats['perplexity']:.2f}, on the second text {floats['perplexity_second_text']:.2f}"
    return "\n\n".join(
        [
            table(PEERS_HEAD, peers_rows(rows, SCORES, processor)),
            f"Float model: {of_float}. {note}",
        ]
    )


def loftq() -> str:
    measured = result("loftq")
    rows = [
        [
            f"{row['nbits']} bits, group {row['group_size']}",
            f"{row['iterations']} iterations, {row['seconds']:.0f} s" if row["iterations"] else "none",
            number(row["perplexity"]),
            f"{row['kl_to_float']:.3f}",
        ]
        for row in measured["rows"]
    ]
    return "\n".join(
        [
            table(["HQQ without data", "LoftQ", "perplexity", "KL"], rows),
            "",
            f"Before any training; adapters of rank {measured['rank']}. Float model: "
            f"{measured['float_perplexity']:.2f}. {measured['model']}; WikiText-2, {measured['windows']} windows of "
            f"{measured['window_tokens']} tokens. "
            + device_line(measured["device"], "python benchmarks/bench_loftq.py"),
        ]
    )


def calibration_options() -> str:
    """What each way to a better model of the same bits gives, on the first blocks of SmolLM2."""
    measured = result("calibration_options")
    rows = [
        [
            row["name"],
            f"{row['bits_per_weight']:.2f}",
            f"{row['kl_wikitext']:.4f}",
            f"{row['kl_help']:.4f}",
            f"{row['cpu_s']:.0f}",
        ]
        for row in measured["rows"]
        if row["every"] == 1 and row["blocks"] == 8
    ]
    return "\n".join(
        [
            table(["HQQ", "bits per weight", "KL, WikiText", "KL, second text", "CPU seconds"], rows),
            "",
            f"The first 8 blocks of {measured['model']}; {measured['calibration_tokens']:,} tokens of WikiText-2, and "
            f"groups of {measured['group_size']} where nothing else is said; shrinkage=0.3 in all rows. "
            + device_line(measured["device"], "python benchmarks/bench_calibration_options.py --blocks 8"),
        ]
    )


def merge() -> str:
    """How much of the adapters each strategy retained, means over the seeds."""
    measured = result("merge")
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for row in measured["rows"]:
        groups.setdefault((row["setting"], row["task"], row["training"], row["strategy"]), []).append(row)
    rows = []
    for (setting, task, training, strategy), found in groups.items():
        means = [statistics.mean(row[f"loss_{which}"] for row in found) for which in ("base", "adapter", "merged")]
        captured = [row["capture"] for row in found]
        spread = f" ({min(captured):.3f} to {max(captured):.3f})" if len(found) > 1 else ""
        rows.append(
            [
                f"{setting}, {task}",
                str(len(found)),
                f"{training}, {found[0]['trained_parameters'] / 1e6:.2f} M",
                strategy,
                f"{statistics.median(row['seconds_to_merge'] for row in found):.0f}",
                f"{statistics.mean(captured):.3f}{spread}",
                *(f"{loss:.3f}" for loss in means),
                " / ".join(
                    f"{statistics.mean(row[which] for row in found):.0%}"
                    for which in ("score_adapter", "score_merged")
                    if all(row[which] is not None for row in found)
                ),
            ]
        )
    options, seeds = measured["training"], sorted({row["seed"] for row in measured["rows"]})
    head = [
        "",
        "seeds",
        "training, parameters",
        "merge",
        "seconds",
        "capture",
        "loss: base",
        "with adapter",
        "merged",
        "score: adapter / merged",
    ]
    steps = "; ".join(
        f"{step['setting']} {step['time_ratio']:.2f} and {step['memory_ratio']:.2f} "
        f"({step['batch']} x {step['tokens']} tokens)"
        for step in measured["steps"]
    )
    return (
        table(head, rows)
        + "\n\nTime and memory of a merge-aware step, plain LoRA = 1: "
        + steps
        + ".\n\nLosses are per token (for orders, per token of an answer); capture is measured on all held-out "
        + "tokens, for orders on prompts too; the score counts answers without a mistake. "
        + f"Rank 8 on all linears, {options['steps']} steps of {options['batch']} x {options['tokens']} tokens, "
        + f"seeds {', '.join(map(str, seeds))}; {options['held_out_tokens']} held-out tokens. "
        + device_line(measured["device"], "python benchmarks/bench_merge.py")
    )


def lora_step(name: str = "lora_step") -> str:
    measured = result(name)
    rows = [
        [
            row["model"] + ("" if row["is_right"] else ", wrong"),
            f"{row['batch']} x {row['tokens']}",
            f"{row['median_s']:.2f} s ({row['min_s']:.2f} to {row['max_s']:.2f})",
            f"{row['rate_vs_dense_float32']:.2f}",
            f"{row['limit_s'] / row['median_s']:.2f}",
            f"{row['model_mib']:.0f} + {row['extra_peak_mib']:.0f}" if "model_mib" in row else "",
        ]
        for row in measured["rows"]
    ]
    head = ["base", "tokens", "seconds a step", "rate, dense float32 = 1", "of the limit", "MiB: model + step"]
    refused = "; ".join(f"the {peer} refuses ({error})" for peer, error in measured["refused"].items() if error)
    kinds = list(dict.fromkeys((row["dtype"], row["dropout"]) for row in measured["saved"]))
    kept = {(row["layer"], row["dtype"], row["dropout"]): row for row in measured["saved"]}
    saved = [
        [layer, *(f"{kept[layer, *kind]['bytes'] / kept[layer, *kind]['floor']:.2f}" for kind in kinds)]
        for layer in dict.fromkeys(row["layer"] for row in measured["saved"])
    ]
    columns = [f"{dtype}{f', dropout {dropout}' if dropout else ''}" for dtype, dropout in kinds]
    rates = ", ".join(f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in measured["product_gflop_per_s"].items())
    note = (
        f"Medians, {measured['clock']}; limit: the step's matrix products at the rate of a large one, "
        f"{rates}; {refused}. {device_line(measured['device'], measured['command'])}"
    )
    if name != "lora_step":
        return "\n\n".join([table(head, rows), note])
    return "\n\n".join(
        [
            table(head, rows),
            "Memory that a layer with LoRA saves for the backward pass, over the minimum (the input in its own dtype, "
            "its product with `A`, with dropout one byte per number of the input):",
            table(["", *columns], saved),
            note,
        ]
    )


def decode(name: str = "decode") -> str:
    """Milliseconds of one 4096 x 4096 layer for each number of tokens, the rate against dense float32, the limit."""
    measured = result(name)
    by_key = {(row["method"], row["tokens"]): row for row in measured["rows"] if row["shape"] == [4096, 4096]}
    tokens = list(dict.fromkeys(n_tokens for _, n_tokens in by_key))
    body = []
    for method in dict.fromkeys(method for method, _ in by_key):
        cells = [method]
        for n_tokens in tokens:
            row = by_key.get((method, n_tokens))
            if row is None:
                cells.append("")
                continue
            share = max(row["limit_s"].values()) / row["median_s"]
            wrong = "" if row["is_right"] else ", wrong"
            cells.append(f"{1e3 * row['median_s']:.2f} ms ({row['rate_vs_dense_float32']:.2f}; {share:.0%}{wrong})")
        body.append(cells)
    head = ["a 4096 x 4096 layer", *(f"{n_tokens} token{'s' * (n_tokens > 1)}" for n_tokens in tokens)]
    return (
        table(head, body)
        + "\n\nIn brackets the rate, dense float32 = 1, and the limit as a fraction of the time: the longer of "
        + f"reading the stored weight at {measured['memory_gb_per_s']:.1f} GB/s and multiplying at "
        + f"{measured['product_gflop_per_s']:.0f} GFLOP/s. Medians, {measured['clock']}; compiled kernels: "
        + f"{measured['device']['kernels']}. {device_line(measured['device'], measured['command'])}"
    )


def decode_shapes(name: str = "decode") -> str:
    """The rate of each layer against dense float32 with one token and with the most."""
    measured = result(name)
    rows = {(tuple(row["shape"]), row["method"], row["tokens"]): row for row in measured["rows"]}
    few, many = min(row["tokens"] for row in measured["rows"]), max(row["tokens"] for row in measured["rows"])
    methods = [
        method
        for method in dict.fromkeys(method for _, method, _ in rows)
        if method.startswith(("HQQ", "AQLM", "torch")) and "LoRA" not in method
    ]
    body = []
    for shape in dict.fromkeys(shape for shape, _, _ in rows):
        cells = [
            " / ".join(f"{rows[shape, method, n]['rate_vs_dense_float32']:.2f}" for n in (few, many))
            for method in methods
        ]
        body.append([" x ".join(map(str, shape)), *cells])
    return table([f"rate with {few} / {many} tokens, dense float32 = 1", *methods], body)


def activations() -> str:
    """What rounding activations costs, with the kernels' blocks and with others."""
    measured = result("activations")
    rows = [
        [
            f"{row['nbits']} bits, group {row['group_size']}",
            f"{row['block']}{'' if row['is_measured'] else ' (by definition)'}",
            f"{row['kl']:.1e}",
            f"{row['top1_agreement']:.1%}",
        ]
        for row in measured["rows"]
    ]
    return (
        table(["HQQ", "columns of a block", "KL to exact activations", "same next token"], rows)
        + f"\n\n{measured['model']}; WikiText-2, {measured['windows']} windows of {measured['window_tokens']} tokens. "
        + device_line(measured["device"], "python benchmarks/bench_activations.py")
    )


def decode_lora() -> str:
    """Microseconds of layers with an adapter, with one token and without gradients, ours and by PEFT's forward."""
    measured = result("decode_lora")
    rows = {(tuple(row["shape"]), row["method"]): row for row in measured["rows"] if row["tokens"] == 1}
    methods = list(dict.fromkeys(method for _, method in rows if "LoRA" in method))
    body = [
        [" x ".join(map(str, shape)), *(f"{1e6 * rows[shape, method]['median_s']:,.0f}" for method in methods)]
        for shape in dict.fromkeys(shape for shape, _ in rows)
    ]
    model = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in measured["model"].items())
    call = measured["call"]
    python = {name: 1e6 * (seconds - call["the kernel"]) for name, seconds in call.items()}
    width = measured["called_width"]
    return (
        table(["us, one token, LoRA r = 8", *methods], body)
        + f"\n\nOne token through SmolLM2-135M at 4 bits with LoRA on every layer: {model}. A call of "
        + f"{width} x {width} takes {python['the layer']:.0f} us more than its kernel alone "
        + f"({1e6 * call['the kernel']:.0f} us), and {python['the layer with LoRA']:.0f} us more with an adapter, "
        + f"whose products are among them. Medians, {measured['clock']}. "
        + device_line(measured["device"], measured["command"])
    )


def generate(name: str = "generate") -> str:
    """Tokens per second of a whole model, and one token taken apart."""
    measured = result(name)
    rows = {row["way"]: row for row in measured["rows"]}
    dense = rows["dense float32"]
    body = [
        [
            way,
            f"{row['prompt_tokens_per_s']:.0f} ({row['prompt_tokens_per_s'] / dense['prompt_tokens_per_s']:.2f})",
            f"{row['tokens_per_s']:.1f} ({row['tokens_per_s'] / dense['tokens_per_s']:.2f})",
            f"{100 * row['limit_s'] * row['tokens_per_s']:.0f}%",
            f"{row['mb']:,.0f}",
        ]
        for way, row in rows.items()
    ]
    parts = ["kernels", "head", "attention", "rest", "token"]
    profile = [[way, *(f"{1e3 * each[part]:.1f}" for part in parts)] for way, each in measured["profile"].items()]
    return "\n".join(
        [
            table(["", "prompt, tokens/s", "generated, tokens/s", "of the limit", "MB"], body),
            "",
            f"In brackets the rate, dense float32 = 1. {measured['prompt']} prompt tokens, {measured['new_tokens']} "
            "generated; the limit is reading the weights once a token at "
            f"{measured['memory_gb_per_s']:.1f} GB/s. Medians, {measured['clock']}. "
            + device_line(measured["device"], measured["command"]),
            "",
            table(
                ["one token, ms", "compiled kernels", "head", "attention", "Python and small operators", "all"],
                profile,
            ),
        ]
    )


def gpu() -> str:
    """Microseconds of layers with few tokens, bandwidth of dequantizing, and training steps, each with the dense."""
    measured = result("gpu")
    device = measured["device"]
    decoding = measured.get("decoding", {}).get("rows", [])
    slow = measured.get("decoding_slow_peers", {}).get("rows", [])
    decoding += [row for row in slow if row["method"] != "dense float16"]
    parts = []
    for shape in dict.fromkeys(tuple(row["shape"]) for row in decoding):
        rows = {(row["method"], row["tokens"]): row for row in decoding if tuple(row["shape"]) == shape}
        tokens = list(dict.fromkeys(n_tokens for _, n_tokens in rows))
        body = []
        for method in dict.fromkeys(method for method, _ in rows):
            found = [rows.get((method, n_tokens)) for n_tokens in tokens]
            cells = [
                f"{1e6 * row['median_s']:.1f} us ({row['rate_vs_dense_float16']:.2f})" if row else "" for row in found
            ]
            body.append([method, *cells])
        parts.append(table([f"a {shape[0]} x {shape[1]} layer", *(f"{n} tokens" for n in tokens)], body))
    if "dequantizing" in measured:
        body = [
            [f"{row['method']}, {row['shape'][0]} x {row['shape'][1]}", f"{row['gb_per_s']:.0f} GB/s"]
            for row in measured["dequantizing"]
        ]
        copying = (
            f"copying: {measured['copying']['gb_per_s']:.0f} GB/s" if "copying" in measured else "read and written"
        )
        parts.append(table(["dequantizing", copying], body))
    if "generating" in measured:
        rows = {(row["model"], row["how"]): row["median_s"] for row in measured["generating"]["rows"]}
        hows = list(dict.fromkeys(how for _, how in rows))
        body = [
            [name, *(f"{1e3 * rows[name, how]:.2f} ms" if (name, how) in rows else "" for how in hows)]
            for name in dict.fromkeys(name for name, _ in rows)
        ]
        head = f"one token, {measured['generating']['layers']} layers of Llama 3 8B"
        parts.append(table([head, *hows], body))
    if "training" in measured:
        body = [
            [
                row["model"],
                f"{row['batch']} x {row['tokens']}",
                f"{1e3 * row['median_s']:.1f} ms ({row['rate_vs_dense_bfloat16']:.2f})",
                f"{row['model_bytes'] / 2**30:.2f} GiB + {row['peak_bytes'] / 2**30:.2f} GiB",
            ]
            for row in measured["training"]["rows"]
        ]
        layers = f"{measured['training']['layers']} layers of Llama 3 8B"
        parts.append(table([f"a LoRA step, {layers}", "tokens", "time", "model and step"], body))
    if "quantizing" in measured:
        body = [
            [f"{row['method']}, {row['shape'][0]} x {row['shape'][1]}", f"{row['million_weights_per_s']:,.0f}"]
            for row in measured["quantizing"]["rows"]
        ]
        parts.append(table(["quantizing", "million weights/s"], body))
    if "loading" in measured:
        body = [
            [row["model"], f"{row['bytes'] / 1e9:.2f} GB", f"{row['median_s']:.2f} s"] for row in measured["loading"]
        ]
        parts.append(table(["from a folder to the device", "files", "time"], body))
    if "forms" in measured:
        body = [
            [row["method"], " x ".join(map(str, row["shape"])), str(row["tokens"]), f"{1e6 * row['median_s']:.1f} us"]
            for row in measured["forms"]
        ]
        parts.append(table(["form of the kernel", "layer", "tokens", "time"], body))
    versions = ", ".join(f"{name} {device[name]}" for name in ("torch", "triton", "bitsandbytes") if name in device)
    note = "In brackets the rate, dense float16 (a step: bfloat16) = 1; medians of GPU time, cold caches."
    return "\n\n".join([*parts, f"{note} `make bench-gpu` on {device['gpu']}; {versions}."])


def quantize(name: str = "quantize") -> str:
    measured = result(name)
    shapes = ([576, 576], [1536, 576], [2048, 2048], [4096, 4096])
    thread_counts = sorted({row["threads"] for row in measured["rows"]})
    rows = []
    for shape in shapes:
        cells = [f"{shape[0]} x {shape[1]}"]
        for made_by in ("ours", "ours, refine_scale", "hqq"):
            for threads in thread_counts:
                found = [
                    row
                    for row in measured["rows"]
                    if (row["shape"], row["nbits"], row["axis"], row["threads"], row["made_by"])
                    == (shape, 4, 1, threads, made_by)
                ]
                cells.append(f"{found[0]['million_weights_per_s']:.1f}" if found else "")
        rows.append(cells)
    head = ["million weights/s, 4 bits"]
    head += [
        f"{what}, {n} thread(s)" for what in ("published algorithm", "default", "hqq package") for n in thread_counts
    ]
    parts = {"4 bits": "model", "3 bits": "model, 3 bits", "2 bits": "model, 2 bits"}
    models = {bits: measured["memory"][part] for bits, part in parts.items()}
    seconds = {bits: statistics.median(run["seconds"] for run in runs) for bits, runs in models.items()}
    extra = max(run["extra_peak_mib"] for runs in models.values() for run in runs)
    whole = "All of SmolLM2-135M, 106 million weights: "
    whole += ", ".join(f"{each:.1f} s at {bits}" for bits, each in seconds.items())
    whole += f"; {extra:.0f} MiB above the float model."
    return (
        table(head, rows)
        + f"\n\n{whole} "
        + f"Compiled kernels: {measured['device']['kernels']}. "
        + device_line(measured["device"], measured["command"])
    )


def rebuild() -> str:
    """Time after over time before the rebuild, of each benchmark's small cases."""
    measured = result("rebuild")
    body = []
    for benchmark in ("quantize", "decode", "lora_step", "calibration"):
        of_floats = [row for row in measured[benchmark] if row["row"].startswith("dense")]
        ours = [row for row in measured[benchmark] if row not in of_floats]
        for name, rows in ((f"`bench_{benchmark}`", ours), (f"`bench_{benchmark}`, float layers", of_floats)):
            if rows:
                slowest = max(rows, key=lambda row: row["after_over_before_of_minima"])
                body.append(
                    [
                        name,
                        str(len(rows)),
                        f"{statistics.median(row['after_over_before'] for row in rows):.2f}",
                        f"{statistics.median(row['after_over_before_of_minima'] for row in rows):.2f}",
                        f"{min(row['after_over_before_of_minima'] for row in rows):.2f}",
                        f"{slowest['after_over_before_of_minima']:.2f} ({slowest['row']})",
                    ]
                )
    head = ["time after / before", "cases", "medians", "fastest calls", "least", "most"]
    commits = f"{measured['before']} and {measured['after']}"
    return (
        table(head, body)
        + "\n\n`medians` and `fastest calls`: the median over the cases of the ratio of their medians, and of their "
        + "fastest calls; `least` and `most` are of fastest calls. CPU time of one thread, compiled kernels: "
        + f"{measured['device']['kernels']}. Commits {commits}. "
        + device_line(measured["device"], "python benchmarks/bench_rebuild.py BEFORE")
    )


def aqlm_quantizer() -> str:
    """Seconds and held-out error of each layer, ours and the research code's; the large layer's time and memory."""
    measured = result("aqlm_quantizer")
    makers = list(dict.fromkeys(row["made_by"] for row in measured["rows"]))
    by_key = {(row["layer"], row["made_by"]): row for row in measured["rows"]}
    rows = []
    for layer in dict.fromkeys(row["layer"] for row in measured["rows"]):
        shape = by_key[layer, "ours"]["shape"]
        cells = [f"{layer}, {shape[0]} x {shape[1]}"]
        for maker in makers:
            row = by_key.get((layer, maker))
            cells.append("" if row is None else f"{row['seconds']:.1f} s, {row['held_out_error']:.4f}")
        rows.append(cells)
    lines = [
        table(["seconds, held-out error", *makers], rows),
        "",
        f"AQLM 2x8, groups of 8; relative squared error of the outputs on {measured['held_out_tokens']:,} tokens, "
        f"after calibration on {measured['calibration_tokens']:,} others; CPU time on one thread, compiled kernels: "
        f"{measured['device']['kernels']}. "
        + device_line(measured["device"], "python benchmarks/bench_aqlm_quantizer.py --research-code FOLDER"),
    ]
    for row in measured["large"]:
        what = "calibrated" if row["is_calibrated"] else "not calibrated"
        lines.append(
            f"A layer of 4096 x 14336, {what}: {row['cpu_seconds'] / 60:.1f} minutes of one thread, "
            f"{row['extra_peak_mib']:,.0f} MiB above the float weight's {row['weight_mib']:.0f}"
            + (" and its second moment's 784." if row["is_calibrated"] else ".")
        )
    return "\n".join(lines)


def demo(name: str = "demo", command: str = "make demo-table") -> str:
    measured = result(name)
    rows = [
        [
            stage["name"],
            f"{stage['size_mb']:.0f}",
            f"{stage['perplexity']:.2f}",
            f"{stage['task_score']:.0%}",
            f"{stage['task_loss']:.3f}",
            f"{stage['seconds']:.1f}",
        ]
        for stage in measured["stages"]
    ]
    training = next(stage for stage in measured["stages"] if stage["seconds_per_step"])
    machine = measured["machine"]
    return "\n".join(
        [
            table(["stage", "MB", "perplexity", "task score", "task loss", "seconds"], rows),
            "",
            f"{training['seconds_per_step']:.2f} s a training step; {measured['seconds']:.0f} s and "
            f"{measured['peak_memory_gib']:.1f} GiB in all. `{command}` on {machine['device']} "
            f"({machine['torch_threads']} threads); torch {machine['torch']}.",
        ]
    )


def peft_features() -> str:
    """State of every feature of PEFT on our layers and on PEFT's own; why, where it does not simply work."""
    measured = result("peft_features")
    bases = [name for name in measured["rows"][0] if name != "method"]
    rows, reasons = [], []
    for row in measured["rows"]:
        rows.append([row["method"], *(row[base]["state"] for base in bases)])
        reasons += [
            f"- {row['method']}, {base}: {row[base]['detail']}" for base in bases if row[base]["state"] != "works"
        ]
    return "\n".join(
        [
            table(["method or feature", *bases], rows),
            "",
            device_line(measured["device"], "make features"),
            "",
            'Details of the cells that do not say "works":',
            "",
            *reasons,
        ]
    )


def conformance() -> str:
    """Results of PEFT's own tests on our layers, and the reasons of the listed exceptions."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in result("conformance"):
        runs.setdefault((run["method"], run["peft"]), []).append(run)
    counts = ("passed", "passed_on_quantized", "expected_failures", "failed", "skipped", "skipped_for_the_hub")
    rows = []
    for (method, version), shards in runs.items():
        parts = int(shards[0]["shard"].partition("/")[2])
        total = [sum(shard[name] for shard in shards) for name in counts]
        is_whole = sorted(shard["shard"] for shard in shards) == [f"{i}/{parts}" for i in range(parts)]
        said = "" if is_whole else f", {len(shards)} of {parts} parts"
        rows.append(
            [f"{method}, PEFT {version}{said}", f"{sum(total[:1] + total[2:4]):,}", *(f"{n:,}" for n in total)]
        )
    head = [
        "",
        "run",
        "passed",
        "of these on quantized layers",
        "listed exceptions",
        "failed",
        "skipped",
        "need the hub",
    ]
    listed: dict[tuple[str, str], int] = {}
    for (method, _), shards in runs.items():
        for entry in (entry for shard in shards for entry in shard["exceptions"]):
            key = (entry["reason"], method)
            listed[key] = listed.get(key, 0) + entry["failed"]
    reasons: dict[str, list[str]] = {}
    for (reason, method), failed in listed.items():
        if failed:
            reasons.setdefault(reason, []).append(f"{method} {failed}")
    lines = [f"- {reason} ({', '.join(where)})" for reason, where in reasons.items()]
    return "\n".join([table(head, rows), "", "The exceptions, with their numbers of tests:", "", *lines])


def models() -> str:
    """What becomes of every generative class of transformers, and each difference in words."""
    measured = result("models")
    return "\n\n".join(
        [
            models_summary(measured) + " " + device_line(measured["device"], "make models"),
            table(MODELS_HEAD, models_rows(measured)),
            "### Differences and errors",
            "\n".join(models_differences(measured)) or "None.",
            "### Not compared",
            "\n".join(models_left_out(measured)) or "None.",
        ]
    )


def mixture_sizes() -> str:
    """Gigabytes of mixtures of experts, as floats and quantized."""
    measured = result("model_sizes")
    rows = []
    for name, found in measured["mixtures"].items():
        sizes = [found[key] for key in ("float", "experts_dense", "hqq4", "hqq3", "hqq2")]
        share = found["experts"] / found["n_parameters"]
        cells = [
            f"{found['n_parameters'] / 1e9:.1f} B",
            f"{100 * share:.0f} %",
            *(f"{each / 1e9:.1f}" for each in sizes),
        ]
        rows.append([name, *cells])
    head = ["model", "parameters", "in experts", "bfloat16", "4 bits, experts dense", "4 bits", "3 bits", "2 bits"]
    return f"{table(head, rows)}\n\nIn GB, embeddings and head in bfloat16, group 64: `{measured['command']}`."


# Those of the README's table, from small to large.
SHOWN_MODELS = ("Llama-3.2-1B", "Qwen3-4B", "Llama-3.1-8B", "Gemma-3-12B, text", "Qwen3-14B", "gpt-oss-20b",
                "Mistral-Small-24B", "Qwen3-30B-A3B", "Qwen3-32B", "Llama-3.3-70B")  # fmt: skip


def model_sizes() -> str:
    """Gibibytes of known models, as floats and quantized, and before LoRA training."""
    measured = result("model_sizes")
    sizes = measured["dense"] | measured["mixtures"]
    rows = [
        [name, *(f"{sizes[name][key] / 2**30:.1f}" for key in ("float", "hqq4", "hqq3", "hqq2", "prepared"))]
        for name in SHOWN_MODELS
    ]
    return table(["GiB", "bfloat16", "4 bits", "3 bits", "2 bits", "4 bits, prepared for LoRA"], rows)


def experts() -> str:
    """A LoRA step on the experts of a mixture, and loading it."""
    measured = result("experts")
    rows = []
    for name, found in measured["variants"].items():
        memory = [f"{found[key]:,.0f}" for key in ("load_peak_mib", "model_mib", "step_peak_mib")]
        rows.append([name, *memory, f"{found['load_cpu_seconds']:.1f}", f"{found['step_cpu_seconds']:.2f}"])
    head = ["", "peak while loading, MiB", "model, MiB", "step above the model, MiB", "loading, CPU s", "step, CPU s"]
    return f"{table(head, rows)}\n\n{measured['layers']} layers, {measured['tokens']} tokens. " + device_line(
        measured["device"], measured["command"]
    )


def trained_mixture() -> str:
    """A mixture that is trained here: quantized, tuned and merged."""
    measured = result("trained_mixture")
    bases = [
        [
            f"{row['base']}, calibrated" if row["is_calibrated"] else row["base"],
            f"{row['bits_per_weight']:.2f}",
            number(row["perplexity"]),
            f"{row['kl']:.4f}",
            _routing(row),
        ]
        for row in measured["bases"]
    ]
    merges = [
        [
            f"{row['base']}, {row['strategy']}",
            f"{row['bits_per_weight']:.2f}",
            *(f"{row[name]:.3f}" for name in ("loss_base", "loss_adapter", "loss_merged")),
            f"{row['gain_retained']:.2%}",
            f"{row['capture']:.4f}",
            _routing(row),
        ]
        for row in measured["merges"]
    ]
    head = ["", "bits per weight", "perplexity", "KL to float", "routing agreement (by layer)"]
    merge_head = ["", "bits per weight", "loss: base", "with adapter", "merged", "gain retained", "capture"]
    return "\n".join(
        [
            table(head, bases),
            "",
            f"Float model: perplexity {measured['float_perplexity']:.2f}; before its training "
            f"{measured['random_perplexity']:,.0f}. On held-out prose.",
            "",
            table([*merge_head, "routing agreement (by layer)"], merges),
            "",
            f"LoRA on attention and experts, {measured['tuning_steps']} steps on Python code, on the calibrated base; "
            f"measured on held-out code, against the adapter before its merge. {measured['n_parameters'] / 1e6:.1f} M "
            f"parameters, trained for {measured['steps']:,} steps of 1,024 tokens, "
            f"{measured['training_cpu_seconds'] / 60:.0f} minutes of one core; {measured['measured_tokens']:,} tokens "
            "measured. " + device_line(measured["device"], measured["command"]),
        ]
    )


def _routing(row: dict[str, Any]) -> str:
    return f"{row['routing']:.1%} ({', '.join(f'{100 * each:.1f}' for each in row['routing_per_layer'])})"


def shared_codebooks() -> str:
    """AQLM on experts with codebooks of their own, and with shared ones."""
    measured = result("trained_mixture")
    rows = [
        [
            f"{row['setting']}, {'shared by the stack' if row['is_shared'] else 'of each expert'}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['weight_error']:.3f}",
            number(row["perplexity"]),
            f"{row['kl']:.4f}",
            f"{row['routing']:.1%}",
        ]
        for row in measured["sharing"]
    ]
    return table(["AQLM codebooks", "bits per weight", "weight error", "perplexity", "KL to float", "routing"], rows)


def exports() -> str:
    """Exported models in the engines' own readers."""
    measured = result("exports")
    return f"{device_line(measured['device'], 'make export-check')}\n\n{table(EXPORTS_HEAD, exports_rows(measured))}"


def transforms(name: str = "transforms", options: str = "") -> str:
    """What each transform gives, beside the model without one."""
    measured = result(name)
    rows = measured["rows"]
    base = {row["name"].rsplit(", none", 1)[0]: row for row in rows if row["name"].endswith(", none")}
    body = []
    for row in rows:
        setting = next(name for name in base if row["name"].startswith(f"{name}, "))
        cells = [setting, row["name"].removeprefix(f"{setting}, ")]
        for text in ("wikitext", "help"):
            kl, without = row[f"kl_{text}"], base[setting][f"kl_{text}"]
            cells.append(f"{kl:.4f}" + ("" if row is base[setting] else f" ({100 * (kl / without - 1):+.0f} %)"))
        elsewhere = f" {MARK}" * (row["cpu"] != measured["device"]["cpu"])
        body.append([*cells, f"{row['transform_cpu_s']:.0f}{elsewhere}"])
    head = ["HQQ", "transform", "KL, WikiText", "KL, second text", "CPU s of the transform"]
    blocks = sorted({row["blocks"] for row in rows})
    command = " and ".join(f"bench_transforms.py --blocks {number}{options}" for number in blocks)
    others = other_processors(rows, measured["device"]["cpu"])
    return f"{table(head, body)}\n\n{device_line(measured['device'], command)}{others}"


def rotated() -> str:
    """What rotating its inputs costs a layer."""
    measured = result("rotated")
    body = []
    for row in measured["rows"]:
        times = row["median_s"]
        body.append(
            [
                f"{row['shape']}, {row['tokens']} token{'s' * (row['tokens'] > 1)}",
                *(f"{1e6 * times[name]:,.0f}" for name in ("dense float32", "plain", "rotated")),
                f"{times['rotated'] / times['plain']:.2f}",
            ]
        )
    head = ["", "dense float32, us", "HQQ, us", "rotated, us", "rotated / HQQ"]
    return (
        f"{table(head, body)}\n\n{device_line(measured['device'], 'python benchmarks/bench_rotated.py --one-thread')}"
    )


def estimate() -> str:
    """What ``pql estimate`` says beside the memory and the time that the verbs took."""
    measured = result("estimate")
    rows = [
        [
            f"{row['model']}, {row['step']}",
            f"{row['estimated_bytes'] / 2**20:,.0f}",
            f"{row['measured_bytes'] / 2**20:,.0f}",
            f"{100 * (row['estimated_bytes'] / row['measured_bytes'] - 1):+.0f} %",
            f"{row['estimated_s']:.0f}",
            f"{row['measured_cpu_s']:.0f}",
        ]
        for row in measured["rows"]
    ]
    head = ["", "peak, MiB: estimated", "measured", "error", "processor seconds: estimated", "measured"]
    return f"{table(head, rows)}\n\n{device_line(measured['device'], 'python benchmarks/bench_estimate.py')}"


def streaming() -> str:
    """Peak memory of quantizing from files to files, by the number of layers."""
    measured = result("streaming")
    rows = [
        [
            "SmolLM2" if row["hidden"] is None else f"{row['case']} layers of width {row['hidden']:,}",
            row["method"].upper() + (", calibrated" if row["calibrated"] else ""),
            f"{row['file_gb']:.2f}",
            f"{row['peak_anonymous_mib']:,.0f}",
            f"{row['peak_anonymous_mib'] - row['imports_mib']:,.0f}",
            f"{row['peak_resident_mib']:,.0f}",
        ]
        for row in measured["rows"]
    ]
    head = ["", "", "float files, GB", "RssAnon, MiB", "without imports", "all resident, MiB"]
    return f"{table(head, rows)}\n\n{device_line(measured['device'], 'python benchmarks/bench_streaming.py')}"


def shared_calibration() -> str:
    """Calibration from files to files on one process and on two."""
    measured = result("shared_calibration")
    rows, alone = [], {}
    for row in measured["rows"]:
        case, most = (row["method"], row["blocks"]), max(row["processor_seconds"], row["processor_seconds_of_others"])
        if row["n_processes"] == 1:
            alone[case] = most
        memory = max(row["peak_resident_mib"], row["peak_resident_mib_of_others"])
        model = "SmolLM2" if row["blocks"] == 30 else f"the first {row['blocks']} blocks of SmolLM2"
        rows.append(
            [
                f"{row['method'].upper()}, {model}, {row['tokens']:,} tokens",
                str(row["n_processes"]),
                f"{most:.0f} ({alone[case] / most:.2f}x)",
                f"{row['seconds']:.0f}",
                f"{memory:,.0f}",
            ]
        )
    head = ["", "processes", "processor's seconds, at most", "seconds by the clock", "all resident, MiB, at most"]
    command = "python benchmarks/bench_streaming.py --shared"
    return f"{table(head, rows)}\n\n{device_line(measured['device'], command)}"


def embeddings() -> str:
    """What quantized embeddings cost in quality and time, and what they save."""
    measured = result("embeddings")
    rows = []
    for row in measured["rows"]:
        rows.append(
            [
                "dense" if row["bits"] is None else f"{row['bits']} bits",
                f"{row['perplexity']:.2f}",
                "" if row["bits"] is None else f"{row['kl_to_dense_embeddings']:.5f}",
                f"{row['kl_to_float']:.4f}",
                f"{row['memory_bytes'] / 1e6:.1f}",
                f"{row['file_bytes'] / 1e6:.1f}",
                f"{1e3 * row['seconds_per_token']:.1f} ({row['rate_vs_dense_embeddings']:.2f}x)",
            ]
        )
    kl = ["KL to dense embeddings", "KL to the float model"]
    head = ["embeddings and head", "perplexity", *kl, "memory, MB", "file, MB", "ms for one token (rate)"]
    return "\n".join(
        [
            table(head, rows),
            "",
            f"{measured['model']}, all other layers HQQ at 4 bits; WikiText-2, {measured['windows']} windows of "
            f"{measured['window_tokens']} tokens; float model: {measured['float_perplexity']:.2f}. Sizes in bfloat16, "
            f"times in float32 ({measured['clock']}). The model was read from a file of 4-bit blocks "
            "of 32, of which each group of 64 contains two. " + device_line(measured["device"], measured["command"]),
        ]
    )


DOCUMENTS: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"model_sizes": model_sizes},
    DOCS / "benchmarks.md": {
        "quality": quality,
        "calibration": calibration,
        "peers": lambda: peers("smollm2"),
        "peers_permuted": lambda: peers("permuted"),
        "peers_minilm": lambda: peers("minilm"),
        "loftq": loftq,
        "merge": merge,
        "decode": decode,
        "decode_avx2": lambda: decode("decode_avx2"),
        "decode_threads": lambda: decode("decode_threads"),
        "decode_threads_avx2": lambda: decode("decode_threads_avx2"),
        "decode_shapes": decode_shapes,
        "decode_lora": decode_lora,
        "activations": activations,
        "generate": generate,
        "generate_1b": lambda: generate("generate_1b"),
        "generate_threads": lambda: generate("generate_threads"),
        "generate_1b_threads": lambda: generate("generate_1b_threads"),
        "generate_avx2": lambda: generate("generate_avx2"),
        "decode_shapes_avx2": lambda: decode_shapes("decode_avx2"),
        "gpu": gpu,
        "lora_step": lora_step,
        "lora_step_threads": lambda: lora_step("lora_step_threads"),
        "lora_step_threads_avx2": lambda: lora_step("lora_step_threads_avx2"),
        "quantize": quantize,
        "quantize_avx2": lambda: quantize("quantize_avx2"),
        "aqlm_quantizer": aqlm_quantizer,
        "demo": demo,
        "demo_aqlm": lambda: demo("demo_aqlm", 'make demo-table ARGS="--method aqlm --calibrate"'),
    },
    DOCS / "decisions.md": {"rebuild": rebuild},
    DOCS / "peft-features.md": {"peft_features": peft_features, "conformance": conformance},
    DOCS / "models.md": {"models": models},
    DOCS / "calibration.md": {"calibration_options": calibration_options, "own_text": own_text},
    DOCS / "experts.md": {
        "mixture_sizes": mixture_sizes,
        "experts": experts,
        "trained_mixture": trained_mixture,
        "shared_codebooks": shared_codebooks,
    },
    DOCS / "embeddings.md": {"embeddings": embeddings},
    DOCS / "exports.md": {"exports": exports},
    DOCS / "larger-than-memory.md": {
        "estimate": estimate,
        "shared_calibration": shared_calibration,
        "streaming": streaming,
    },
    DOCS / "transforms.md": {
        "transforms": transforms,
        "rotated": rotated,
        "transforms_permuted": lambda: transforms("transforms_permuted", " --permuted"),
    },
}


# What makes the results of a table that may be missing.
MADE_BY = {
    "gpu": "`make bench-gpu`, on a machine with a GPU",
    "generate": "`python benchmarks/bench_generate.py --one-thread`",
    "generate_1b": "`python benchmarks/bench_generate.py --one-thread --shape 1b`",
    "estimate": "`python benchmarks/bench_estimate.py`",
    "streaming": "`python benchmarks/bench_streaming.py`",
    "shared_calibration": "`python benchmarks/bench_streaming.py --shared`",
    "peers_minilm": "`python benchmarks/bench_peers.py minilm`",
    "peers_permuted": "`python benchmarks/bench_peers.py permuted`",
}


def with_tables(document: Path) -> str:
    """Its text with new tables between ``<!-- table NAME -->`` and ``<!-- end -->``."""
    text = document.read_text()
    for name, make in DOCUMENTS[document].items():
        marker = f"<!-- table {name} -->\n"
        if text.count(marker) != 1:
            raise SystemExit(
                f"{document.name} has {text.count(marker)} places for the table {name!r}; it must have one."
            )
        before, _, rest = text.partition(marker)
        _, end, after = rest.partition("<!-- end -->")
        try:
            made = make()
        except FileNotFoundError:
            made = f"Not measured yet: {MADE_BY.get(name, '`make bench`')}."
        text = f"{before}{marker}{made}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page is outdated")
    args = parser.parse_args()
    made = {document: with_tables(document) for document in DOCUMENTS}
    outdated = [document.name for document, text in made.items() if text != document.read_text()]
    if args.check:
        sys.exit(f"{outdated} are not what benchmarks/results says; run `make tables`." if outdated else 0)
    for document, text in made.items():
        document.write_text(text)


if __name__ == "__main__":
    main()
