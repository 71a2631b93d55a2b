"""Seconds for one linear layer with 1 to 128 tokens on the CPU: ours, the peers' and dense float32.

Every product is first compared with that of the dequantized weight; a wrong one of ours ends the run, a wrong one of a
peer is recorded. Then all take turns, so that no weight is still in the cache from the call before. Each time is
compared with two limits that are measured in the same run: reading the stored weight once at the memory's bandwidth (a
weight that stays in a cache can be faster), and multiplying at the rate of a large product in float32 (bfloat16 can be
faster).

On a shared machine the threads of a product wait for each other, and wall-clock times are unreliable: ``--one-thread``
uses one thread and counts its CPU time. ``--avx2`` leaves AVX-512 unused, in all libraries that have a setting for it.
``--lora`` times layers with an adapter only, one token through the whole of SmolLM2-135M with one on every layer, and
the parts of one small layer's call.
Rows of shapes that are not timed now stay in the file, if the same device made them.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numba
import torch
from _cpu import Clock, add_options, begin, ending, kernels_in_use, memory_bandwidth, operations_per_second
from _demo_model import demo_model_folder
from _device import describe_device
from _linears import Candidate, candidates
from _shapes import SHAPES
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from quantlayers_kernels import native
from quantlayers_kernels.hqq.cpu import weight_of
from quantlayers_kernels.native_product import empty_product

RESULTS = Path(__file__).parent / "results"
DEFAULT_SHAPES = (
    "SmolLM2-135M q_proj",
    "SmolLM2-135M gate_proj",
    "Llama-3-8B q_proj",
    "Llama-3-8B gate_proj",
    "Qwen2.5-7B q_proj",
    "Qwen2.5-7B gate_proj",
    "Llama-3-70B q_proj",
    "Llama-3-70B down_proj",
)
# Peers that rebuild the dense weight for every call need seconds, and gigabytes, beyond this; all take fewer turns.
LARGE_WEIGHT = 4096 * 4096
MAX_REPEATS_OF_LARGE = 10
# The layer whose call is taken apart, and calls that are timed at once.
CALLED_WIDTH, CALLS = 576, 1000


def relative_error(candidate: Candidate, x: torch.Tensor) -> float:
    truth = x.double() @ candidate.weight.double().t()
    return ((candidate.multiply(x).double() - truth).norm() / truth.norm()).item()


def checked(name: str, candidate: Candidate, in_features: int) -> bool:
    """Whether the product is right; one that is not and is ours ends the run."""
    n_threads = torch.get_num_threads()
    for n_tokens in (1, 3, 40):
        error = relative_error(candidate, torch.randn(min(n_tokens, candidate.max_tokens), in_features))
        torch.set_num_threads(n_threads)  # numba, when it starts its threads, changes torch's number as well
        if not error < candidate.tolerance:
            message = f"{name}: the product of {n_tokens} tokens is off by {error:.1e}"
            if candidate.is_ours:
                raise SystemExit(f"{message}: nothing was timed.")
            print(message, flush=True)
            return False
    return True


def seconds_per_call(
    ways: dict[str, Candidate], x: torch.Tensor, repeats: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of each, taking turns; the first round warms up."""
    n_threads = torch.get_num_threads()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        # A new order each time: what comes after a large product finds its code and weight out of the caches.
        for name in random.sample(sorted(ways), len(ways)):
            start = clock()
            ways[name].multiply(x)
            if repeat:
                seconds[name].append(clock() - start)
    if torch.get_num_threads() != n_threads:
        raise SystemExit(f"a peer changed the number of threads from {n_threads} to {torch.get_num_threads()}.")
    return seconds


def rows_to_keep(path: Path, measured: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of ``path`` for shapes that were not timed now, if the same device and versions made them."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != measured[key] for key in ("device", "clock")):
        return []
    shapes = [row["shape"] for row in measured["rows"]]
    return [row for row in before["rows"] if row["shape"] not in shapes]


def token_of_model(repeats: int, clock: Clock) -> dict[str, float]:
    """Median seconds of one token through SmolLM2-135M, HQQ at 4 bits with LoRA on every layer: ours, and PEFT's."""
    model = AutoModelForCausalLM.from_pretrained(
        demo_model_folder(), dtype=torch.float32, quantization_config=pql.HQQConfig(nbits=4)
    )
    adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)).eval()
    layers = [module for module in adapted.modules() if isinstance(module, LoraLinear)]
    forwards = {"ours": type(layers[0]).forward, "PEFT's forward": LoraLinear.forward}
    token, logits = torch.tensor([[1]]), {}
    seconds: dict[str, list[float]] = {name: [] for name in forwards}
    for repeat in range(repeats + 1):
        for name in random.sample(sorted(forwards), len(forwards)):
            for layer in layers:
                layer.forward = forwards[name].__get__(layer)
            start = clock()
            logits[name] = adapted(input_ids=token).logits
            if repeat:
                seconds[name].append(clock() - start)
    error = (logits["ours"] - logits["PEFT's forward"]).norm() / logits["ours"].norm()
    if error > 1e-4:
        raise SystemExit(f"the two forwards differ by {error:.1e}.")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(", ".join(f"SmolLM2-135M + LoRA, {name}: {1e3 * median:.1f} ms" for name, median in medians.items()))
    return medians


def parts_of_a_call(repeats: int, clock: Clock) -> dict[str, float]:
    """Median seconds of one token through a small layer: the kernel alone, the layer, and it with an adapter."""
    models = [nn.Sequential(nn.Linear(CALLED_WIDTH, CALLED_WIDTH, bias=False)).eval() for _ in range(2)]
    for model in models:
        pql.quantize_model(model, pql.HQQConfig(nbits=4), progress=False)
    layer: Any = models[0][0]
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False)
    adapted = get_peft_model(models[1], config).eval().base_model.model[0]
    x = torch.randn(1, CALLED_WIDTH)
    weight = weight_of(layer.W_q, layer.scale, layer.zero, nbits=4, axis=1, in_features=CALLED_WIDTH)
    y, product = empty_product(x, None, CALLED_WIDTH)
    ways: dict[str, Callable[[], object]] = {
        "the kernel": lambda: native.call("ql_hqq_linear", weight, product),
        "the layer": lambda: layer(x),
        "the layer with LoRA": lambda: adapted(x),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, way in ways.items():
            start = clock()
            for _ in range(CALLS):
                way()
            if repeat:
                seconds[name].append((clock() - start) / CALLS)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(", ".join(f"{name} {1e6 * median:.1f} us" for name, median in medians.items()), flush=True)
    del y  # which the kernel wrote until now
    return medians


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(DEFAULT_SHAPES))
    parser.add_argument("--lora", action="store_true", help="only layers with an adapter, and a model with adapters")
    add_options(parser)
    args = parser.parse_args()
    clock, clock_name = begin(args)
    numba.set_num_threads(torch.get_num_threads())

    bandwidth = memory_bandwidth(args.repeats, clock)
    operations = operations_per_second(torch.float32, args.repeats, clock)
    rows = []
    for out_features, in_features in (SHAPES[name] for name in args.shapes):
        is_large = out_features * in_features > LARGE_WEIGHT
        repeats = min(args.repeats, MAX_REPEATS_OF_LARGE) if is_large else args.repeats
        ways, is_right = {}, {}
        for name, way in candidates(out_features, in_features, with_slow_peers=not is_large and not args.lora):
            if args.lora and "LoRA" not in name and name != "dense float32":
                continue
            is_right[name] = checked(name, way, in_features)
            ways[name] = replace(way, weight=torch.empty(0))
        for n_tokens in args.tokens:
            timed = {name: way for name, way in ways.items() if n_tokens <= way.max_tokens}
            seconds = seconds_per_call(timed, torch.randn(n_tokens, in_features), repeats, clock)
            dense = statistics.median(seconds["dense float32"])
            for name, times in seconds.items():
                median = statistics.median(times)
                row = {
                    "shape": [out_features, in_features],
                    "tokens": n_tokens,
                    "method": name,
                    "is_right": is_right[name],
                    "median_s": median,
                    "min_s": min(times),
                    "quartiles_s": statistics.quantiles(times, n=4)[::2],
                    "rate_vs_dense_float32": dense / median,
                    "rate_vs_dense_float32_of_minima": min(seconds["dense float32"]) / min(times),
                    "gb_per_s": ways[name].nbytes / median / 1e9,
                    "limit_s": {
                        "reading": ways[name].nbytes / bandwidth,
                        "multiplying": 2 * n_tokens * out_features * in_features / operations,
                    },
                }
                rows.append(row)
                print(
                    f"{out_features:5} x {in_features}  {n_tokens:3} tokens  {name:32}  {1e3 * median:8.3f} ms  "
                    f"(min {1e3 * min(times):8.3f})  {row['rate_vs_dense_float32']:5.2f} x dense  "
                    f"{row['gb_per_s']:5.1f} GB/s; limits: "
                    + ", ".join(f"{what} {1e3 * limit:.3f} ms" for what, limit in row["limit_s"].items()),
                    flush=True,
                )
    device = describe_device() | {"hqq": version("hqq"), "aqlm": version("aqlm"), "kernels": kernels_in_use()}
    device["bitsandbytes"] = version("bitsandbytes")
    measured = {
        "device": device,
        "command": shlex.join(["python", "benchmarks/bench_decode.py", *sys.argv[1:]]),
        "clock": clock_name,
        "memory_gb_per_s": bandwidth / 1e9,
        "product_gflop_per_s": operations / 1e9,
        "rows": rows,
    }
    if args.lora:
        measured["model"] = token_of_model(args.repeats, clock)
        measured |= {"called_width": CALLED_WIDTH, "call": parts_of_a_call(args.repeats, clock)}
    path = RESULTS / f"decode{'_lora' if args.lora else ''}{ending(args)}.json"
    order = [list(shape) for shape in SHAPES.values()]
    measured["rows"] = sorted(rows + rows_to_keep(path, measured), key=lambda row: order.index(row["shape"]))
    path.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
