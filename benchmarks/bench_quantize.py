"""Weights quantized per second with HQQ, ours and the ``hqq`` package, and the memory needed.

Groups of 64, 20 iterations, Gaussian weights, float32 on the CPU; both start from the same zero (the package would
round it at 4 bits). First the results are compared, on one shape at every width and axis; a worse one ends the run
before anything is timed. Peers take turns in one process. Memory is the high-water mark of the resident set (VmHWM,
reset before the call) in a fresh process, above what was resident before the call; the quantized result counts in.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from _cpu import Clock, add_options, clock_of, kernels_in_use, settle
from _demo_model import demo_model_folder
from _device import describe_device
from _memory import extra_memory_of, in_own_process
from _peers import peer_weight, quantize_with_hqq
from torch import Tensor
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.methods import get_method
from quantlayers_kernels.bitpack import unpack

RESULTS = Path(__file__).parent / "results"
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (4096, 4096))
WIDTHS = (8, 4, 3, 2)
GROUP_SIZE = 64
# The package needs up to half a minute for the largest weight: timed once there, and at one width only.
PEER_REPEATS = {576 * 576: 3, 1536 * 576: 3, 2048 * 2048: 1, 4096 * 4096: 1}
PEER_WIDTHS_OF_LARGEST = (4,)


def random_weight(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def spec_of(nbits: int, axis: int, refine_scale: bool) -> pql.HQQSpec:
    return pql.HQQSpec(
        nbits=nbits, group_size=GROUP_SIZE, axis=axis, round_zero=refine_scale, refine_scale=refine_scale
    )


def refuse_wrong_result(weight: Tensor, nbits: int, axis: int) -> None:
    """Compare with the package: codes equal but for one in a thousand, squared error not larger, refined lower.

    With float32 metadata, as the package has it here: ours are coded against the scales that are stored, and float16
    ones move 1.5 % of the codes at 8 bits.
    """
    peer = peer_weight(*quantize_with_hqq(weight, nbits=nbits, group_size=GROUP_SIZE, axis=axis, round_zero=False))
    errors, codes = [], None
    for refine_scale in (False, True):
        spec = dataclasses.replace(spec_of(nbits, axis, refine_scale), scale_dtype="float32")
        method = get_method(spec.method)
        quantized = method.quantize(weight, spec)
        dense = method.dequantize(quantized)
        errors.append((dense - weight).square().sum().item())
        codes = unpack(quantized.tensors["W_q"], nbits, weight.shape[1]) if codes is None else codes
    n_equal = (codes == peer.codes).float().mean().item()
    peer_error = (peer.dense - weight).square().sum().item()
    if n_equal < 0.999 or errors[0] > 1.001 * peer_error or errors[1] > errors[0]:
        raise SystemExit(
            f"{tuple(weight.shape)}, {nbits} bits, axis {axis}: {n_equal:.2%} of the codes are equal, squared errors "
            f"{errors} against {peer_error}: nothing was timed."
        )


def measure(shape: tuple[int, int], nbits: int, axis: int, *, threads: int, repeats: int, clock: Clock) -> list[dict]:
    weight = random_weight(shape)
    calls: dict[str, Callable[[], object]] = {}
    for made_by, refine_scale in (("ours", False), ("ours, refine_scale", True)):
        spec = spec_of(nbits, axis, refine_scale)
        calls[made_by] = lambda spec=spec: get_method(spec.method).quantize(weight, spec)
    n_peer = PEER_REPEATS[weight.numel()]
    if shape == SHAPES[-1] and nbits not in PEER_WIDTHS_OF_LARGEST:
        n_peer = 0
    calls["hqq"] = lambda: quantize_with_hqq(weight, nbits=nbits, group_size=GROUP_SIZE, axis=axis, round_zero=False)
    seconds: dict[str, list[float]] = {made_by: [] for made_by in calls}
    calls["ours"]()
    for repeat in range(repeats):
        for made_by, call in calls.items():
            if made_by != "hqq" or repeat < n_peer:
                start = clock()
                call()
                seconds[made_by].append(clock() - start)
    peer = statistics.median(seconds["hqq"]) if seconds["hqq"] else None
    rows = []
    for made_by, times in seconds.items():
        if not times:
            continue
        median = statistics.median(times)
        rows.append(
            {
                "made_by": made_by,
                "shape": shape,
                "nbits": nbits,
                "axis": axis,
                "threads": threads,
                "repeats": len(times),
                "median_s": median,
                "min_s": min(times),
                "max_s": max(times),
                "million_weights_per_s": weight.numel() / median / 1e6,
                "best_million_weights_per_s": weight.numel() / min(times) / 1e6,
                "rate_vs_hqq": None if peer is None else peer / median,
            }
        )
    return rows


def show(row: dict) -> None:
    ratio = "" if row["rate_vs_hqq"] is None else f"{row['rate_vs_hqq']:7.1f} x hqq"
    shape = f"{row['shape'][0]} x {row['shape'][1]}"
    print(
        f"{shape:>11}  {row['nbits']} bits  axis {row['axis']}  {row['threads']} thread(s)  {row['made_by']:19} "
        f" {row['million_weights_per_s']:7.2f} M/s  best {row['best_million_weights_per_s']:7.2f}  "
        f"({row['min_s']:.4f} to {row['max_s']:.4f} s){ratio}",
        flush=True,
    )


# ---- memory, each in a process of its own


def measure_layer() -> dict[str, float]:
    """One float32 layer of 4096 x 4096, 64 MiB, at 4 bits; a small one first, so that code and threads are there."""
    spec = spec_of(4, 1, True)
    method = get_method(spec.method)
    method.quantize(random_weight((64, 64)), spec)
    weight = random_weight((4096, 4096))
    return extra_memory_of(lambda: method.quantize(weight, spec))


def measure_model(nbits: int = 4) -> dict[str, float]:
    """SmolLM2-135M in float32, quantized in place; at 2 bits most of its groups need the shrinking steps."""
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # transformers maps the file, whose pages would count as they are read
    return extra_memory_of(lambda: pql.quantize_model(model, pql.HQQConfig(nbits=nbits), progress=False))


PARTS = {
    "layer": measure_layer,
    "model": measure_model,
    "model, 3 bits": lambda: measure_model(3),
    "model, 2 bits": lambda: measure_model(2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--part", choices=PARTS, help="measure the memory of this part alone, in this process")
    parser.add_argument("--only-parts", action="store_true", help="measure the parts again, keep the other rows")
    add_options(parser)
    args = parser.parse_args()
    settle(args)
    if args.part:
        print(json.dumps(PARTS[args.part]()))
        return

    path = RESULTS / ("quantize_avx2.json" if args.avx2 else "quantize.json")
    options = [name for name, is_on in (("--one-thread", args.one_thread), ("--avx2", args.avx2)) if is_on]
    memory = {part: [json.loads(in_own_process("--part", part, *options)) for _ in range(3)] for part in PARTS}
    for part, runs in memory.items():
        best = min(runs, key=lambda run: run["seconds"])
        print(
            f"{part}: {best['seconds']:.2f} s, peak {best['extra_peak_mib']:.0f} MiB above the float one", flush=True
        )

    if args.only_parts:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"memory": memory}, indent=2) + "\n")
        return

    for nbits in WIDTHS:
        for axis in (0, 1):
            refuse_wrong_result(random_weight(SHAPES[1]), nbits, axis)
    clock, clock_name = clock_of(args)
    rows = []
    for threads in (1,) if args.one_thread else (1, 2):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            for nbits in WIDTHS:
                for axis in (0, 1):
                    measured = measure(shape, nbits, axis, threads=threads, repeats=args.repeats, clock=clock)
                    for row in measured:
                        show(row)
                    rows += measured
    result = {
        "device": describe_device() | {"hqq": version("hqq"), "kernels": kernels_in_use()},
        "command": " ".join(["python benchmarks/bench_quantize.py", *options]),
        "clock": clock_name,
        "group_size": GROUP_SIZE,
        "memory": memory,
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
