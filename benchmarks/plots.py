"""Draw the figures of ``docs/images/`` from ``benchmarks/results/*.json``, as SVG with the same bytes in every run."""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from tables import result

import peft_quantlayers as pql
from peft_quantlayers.methods import get_method

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
STYLE = {
    "svg.hashsalt": "quantlayers",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def size_and_score(axes: Axes) -> None:
    """A finetuned model's score: adapter beside the base, merged by us, merged by PEFT on hqq's layers."""
    demo, rows = result("demo"), [row for row in result("merge")["rows"] if row["task"] == "orders"]
    stages = {stage["name"]: stage for stage in demo["stages"]}
    float_mb, quantized_mb = (stages[name]["size_mb"] for name in ("float", "quantized, 4 bits"))
    millions = (float_mb - quantized_mb) / (4 - 4.5 / 8)  # of quantized weights; the rest is float32
    bits = {"HQQ 4-bit g64": 4.5, "HQQ 2-bit g16": 4.0, "HQQ 3-bit g64": 3.5, "AQLM 2x8, calibrated": 2.15}
    kinds = {
        "adapter beside it": ("score_adapter", "calibrated"),
        "merged here, calibrated": ("score_merged", "calibrated"),
        "merged by PEFT + hqq": ("score_merged", "peft+hqq"),
    }
    bars = axes.bar(0, 100 * stages["merged, dense"]["task_score"], 0.27, color="gray", label="merged into float32")
    axes.bar_label(bars, fmt="%.0f", fontsize=8)
    for shift, (label, (field, strategy)) in enumerate(kinds.items()):
        scores = {}
        for place, setting in enumerate(bits, start=1):
            chosen = [
                row[field]
                for row in rows
                if (row["setting"], row["strategy"], row["training"]) == (setting, strategy, "plain")
            ]
            if chosen:
                scores[place + 0.29 * (shift - 1)] = 100 * statistics.mean(chosen)
        bars = axes.bar(list(scores), list(scores.values()), 0.27, label=label)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    names = [f"{name.split(',')[0]}\n{float_mb - millions * (4 - width / 8):.0f} MB" for name, width in bits.items()]
    axes.set_xticks(range(len(names) + 1), [f"float32\n{float_mb:.0f} MB", *names], fontsize=9)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="orders without a mistake, %", ylim=(0, 132), yticks=range(0, 101, 20))
    axes.legend(loc="upper center", ncols=2, fontsize=9)


def capture_by_strategy(axes: Axes) -> None:
    """How much of a plain adapter's effect each merge retained on text, mean of the seeds."""
    rows = [row for row in result("merge")["rows"] if row["task"] == "text" and row["training"] == "plain"]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    strategies = {"peft+hqq": "PEFT + hqq", "requantize": "requantize", "append": "append", "calibrated": "calibrated"}
    for shift, (strategy, label) in enumerate(strategies.items()):
        captured = {}
        for place, setting in enumerate(settings):
            found = [row["capture"] for row in rows if (row["setting"], row["strategy"]) == (setting, strategy)]
            if found:
                captured[place + 0.21 * (shift - 1.5)] = statistics.mean(found)
        bars = axes.bar(list(captured), list(captured.values()), 0.2, label=label)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    axes.set_xticks(range(len(settings)), [setting.split(",")[0] for setting in settings], fontsize=9)
    axes.grid(axis="x", visible=False)
    axes.set(ylabel="capture", ylim=(0, 1.2))
    axes.legend(loc="upper center", ncols=4, fontsize=8)


def quality_and_bits(axes: Axes) -> None:
    """KL divergence from the float model at each number of bits per weight, before any training."""
    found: dict[str, list[tuple[float, float]]] = {}
    names = {"ours": "HQQ, no data", "hqq": "hqq package, no data"}
    for row in result("quality")["rows"]:
        if row["made_by"] in names and row["group_size"] == 64 and row["nbits"] < 8:
            found.setdefault(names[row["made_by"]], []).append((row["bits_per_weight"], row["kl_to_float"]))
    calibrated = {row["name"]: row for row in result("calibration")["rows"] if " + " not in row["name"]}
    for name, row in calibrated.items():
        # Uniform widths; those without asymmetric targets only where today's default is not measured.
        others = ("group 16", "mixed", "best", "zeros", "HQQ 2 bits, group 64, calibrated, finetuned")
        is_replaced = name.replace(", without asymmetric targets", "") in calibrated.keys() - {name}
        if "calibrated" in name and not is_replaced and not any(other in name for other in others):
            kind = "AQLM, calibrated" if "AQLM" in name else "HQQ, calibrated"
            found.setdefault(kind, []).append((row["bits_per_weight"], row["kl_to_float"]))
    for (label, points), marker in zip(found.items(), "osD^", strict=False):
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=label)
    axes.set(xlabel="bits per weight, metadata counted; groups of 64", ylabel="KL to the float model", yscale="log")
    axes.legend()


def memory_of_a_step(axes: Axes) -> None:
    """Memory of a LoRA step of 4 x 128 tokens: the model, and what the step adds."""
    names = ["dense float32", "PEFT + hqq package, float32", "PEFT + bitsandbytes NF4, float32", "HQQ 4-bit, float32",
             "AQLM 2x8, float32", "HQQ 4-bit, bfloat16"]  # fmt: skip
    rows = {row["model"]: row for row in result("lora_step")["rows"] if row["tokens"] == 128}
    model = [rows[name]["model_mib"] for name in names]
    step = [rows[name]["extra_peak_mib"] for name in names]
    axes.barh(names, model, label="model")
    axes.barh(names, step, left=model, label="the step above it")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="MiB, SmolLM2-135M")
    axes.legend()


def speed_and_tokens(axes: Axes) -> None:
    """Rate of a layer of 4096 x 4096 beside dense float32, at each number of tokens in a call."""
    methods = ["HQQ 4-bit", "HQQ 2-bit", "AQLM 2x8", "torch int4, bfloat16", "bitsandbytes NF4"]
    for method, marker in zip(methods, "osD^v", strict=True):
        points = [
            (row["tokens"], row["rate_vs_dense_float32"])
            for row in result("decode")["rows"]
            if row["shape"] == [4096, 4096] and row["method"] == method
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker=marker, label=method)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="tokens in a call", ylabel="rate, dense float32 = 1", xscale="log", yscale="log")
    axes.set_xticks([1, 4, 16, 128], ["1", "4", "16", "128"], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    axes.legend()


def grid(axes: Axes) -> None:
    """One group of 64 weights, sorted, and what its codes of 4, 3 and 2 bits stand for."""
    group = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).sort().values
    method = get_method("hqq")
    axes.plot(group[0], "o", color="black", markersize=3, label="64 weights of a group")
    for nbits in (4, 3, 2):
        quantized = method.quantize(group, pql.HQQSpec(nbits=nbits, group_size=64))
        axes.step(range(64), method.dequantize(quantized)[0], where="mid", label=f"{nbits} bits")
    axes.set(xlabel="weights, sorted", ylabel="value")
    axes.legend()


def codebooks(axes: Axes) -> None:
    """Pairs of weights, and all sums of an entry of each of two codebooks of eight: AQLM with groups of two."""
    weight = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0))
    spec = pql.AQLMSpec(num_codebooks=2, nbits_per_codebook=3, in_group_size=2)
    tensors = get_method("aqlm").quantize(weight, spec).tensors
    first, second = tensors["codebooks"].float()[:, :, 0] * tensors["scales"].item()
    axes.plot(*weight.view(-1, 2).T, ".", color="gray", markersize=3, label="pairs of weights")
    axes.plot(*(first[:, None] + second).reshape(-1, 2).T, "x", label="sums of two entries")
    axes.set(xlabel="first weight", ylabel="second weight", aspect="equal")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def dither(axes: Axes) -> None:
    """What is left of a delta of a tenth of a step in a sum over inputs, rounded with and without a dither."""
    generator = torch.Generator().manual_seed(0)
    n_inputs = torch.arange(1, 2049)
    codes = torch.randint(2, 14, n_inputs.shape, generator=generator).float()
    shifts = torch.rand(n_inputs.shape, generator=generator) - 0.5
    for label, shift in (("nearest code", 0.0), ("with a dither", shifts)):
        moved = (codes + 0.1 + shift).round() - codes
        axes.plot(n_inputs, moved.cumsum(0) / (0.1 * n_inputs), label=label)
    axes.axhline(1, color="black", linewidth=1)
    axes.set(xlabel="inputs in the sum", ylabel="fraction of the delta", xscale="log", ylim=(-0.5, 3))
    axes.legend()


FIGURES: dict[str, Callable[[Axes], None]] = {
    "size_and_score": size_and_score,
    "capture_by_strategy": capture_by_strategy,
    "quality_and_bits": quality_and_bits,
    "memory_of_a_step": memory_of_a_step,
    "speed_and_tokens": speed_and_tokens,
    "grid": grid,
    "codebooks": codebooks,
    "dither": dither,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=IMAGES, help="folder of the figures")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    mpl.use("svg")
    with mpl.rc_context(STYLE):
        for name, draw in FIGURES.items():
            figure, axes = plt.subplots(figsize=(6.6, 3.6))
            draw(axes)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            plt.close(figure)


if __name__ == "__main__":
    main()
