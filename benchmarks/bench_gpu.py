"""The kernels on a GPU: products with few tokens, generating, LoRA training steps, quantizing, loading.

First the tests of ``tests/gpu`` run, and their outcome is stored in the result. Every product is then compared with
that of the dequantized weight; a wrong one of ours ends its part, a wrong one of a peer is recorded, and so is the
error of one that fails. Then all take turns, each with a flushed level-2 cache, and medians of CUDA events are stored;
a pause on the GPU before each lets the host run ahead, so that launching is not measured. The host's time is stored
separately.

The most important parts come first. ``--seconds`` is the limit for everything: parts that no longer fit are named in
the result and left out, and the file is written after each part. At the deadline the program ends even in the middle
of a part; a peer's compilation cannot be interrupted otherwise, so the slow peers come last. ``--device cpu --tiny
--output FILE`` runs everything at a small size on a CPU: a test of this program, not a measurement.
"""

import argparse
import copy
import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from _device import describe_device
from _gpu_linears import PEERS, SLOW_PEERS, aqlm_tensors, hqq_tensors, ours
from _linears import GROUP_SIZE, Candidate
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache

import peft_quantlayers as pql
from peft_quantlayers import QuantizedLinear
from peft_quantlayers.calibration import InputStatistics
from peft_quantlayers.methods import get_method
from quantlayers_kernels import gpu, gpu_tuning, tiled
from quantlayers_kernels.aqlm import aqlm_dequantize
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference
from quantlayers_kernels.hqq import hqq_dequantize
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "gpu.json"
VERSIONS = ("triton", "bitsandbytes", "gemlite", "hqq", "aqlm")
MAX_ERROR_CHARS = 300


class WrongResult(Exception):
    """A result of ours is wrong: the part is not timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is."""

    shapes: tuple[tuple[int, int], ...] = ((4096, 4096), (8192, 28672))
    tokens: tuple[int, ...] = (1, 2, 4, 16, 64)
    sweep_tokens: tuple[int, ...] = (16, 32, 64, 128, 256)
    tile_tokens: int = 4096
    tile_elements: tuple[int, ...] = (1 << 22, 1 << 24, 1 << 26, 1 << 28)
    copy_bytes: int = 1 << 30
    repeats: int = 30
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 2
    vocabulary: int = 2048
    batches: tuple[tuple[int, int], ...] = ((1, 4096), (4, 4096))
    steps: int = 5
    quantized_shape: tuple[int, int] = (4096, 4096)
    quantizing_rounds: int = 3
    form_tokens: tuple[int, ...] = (1, 16, 64)
    cached_tokens: int = 512
    loadings: int = 3


TINY = Sizes(
    shapes=((64, 128), (32, 256)),
    tokens=(1, 3),
    sweep_tokens=(16, 200),
    tile_tokens=32,
    tile_elements=(2048, 1 << 20),
    copy_bytes=1 << 16,
    repeats=2,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    layers=1,
    vocabulary=64,
    batches=((1, 16),),
    steps=1,
    quantized_shape=(64, 128),
    form_tokens=(1, 16),
    cached_tokens=32,
    loadings=1,
)


class Clock:
    """Seconds of calls on a device: CUDA events, or wall-clock time on a CPU."""

    # GPU cycles of the pause in which the host gets ahead: a third of a millisecond or more.
    PAUSE_CYCLES = 600_000

    def __init__(self, device: str) -> None:
        self.is_gpu = device != "cpu"
        if self.is_gpu:
            size = torch.cuda.get_device_properties(device).L2_cache_size
            self.flushed = torch.empty(max(2 * size, 1 << 27), dtype=torch.int8, device=device)

    def seconds(self, ways: dict[str, Callable[[], Any]], repeats: int, n_warmups: int = 2) -> dict[str, list[float]]:
        """Of each, taking turns in a new order each time; the first rounds warm up."""
        found: dict[str, list[Any]] = {name: [] for name in ways}
        for repeat in range(repeats + n_warmups):
            for name in random.sample(sorted(ways), len(ways)):
                timed = self._events(ways[name]) if self.is_gpu else self._wall(ways[name])
                if repeat >= n_warmups:
                    found[name].append(timed)
        if not self.is_gpu:
            return found
        torch.cuda.synchronize()
        return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in found.items()}

    def _events(self, run: Callable[[], Any]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        torch.cuda._sleep(self.PAUSE_CYCLES)
        start.record()
        run()
        end.record()
        return start, end

    def _wall(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def host_seconds(self, run: Callable[[], Any], repeats: int) -> float:
        """Seconds of the host for one call, without waiting for the device."""
        run()
        self.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        seconds = (time.perf_counter() - start) / repeats
        self.wait()
        return seconds

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


@dataclasses.dataclass(kw_only=True)
class Bench:
    """One run: where, how large, until when, and what was found."""

    device: str
    sizes: Sizes
    deadline: float
    output: Path
    clock: Clock
    found: dict[str, Any]
    running: str = "nothing"

    def part(self, name: str, run: Callable[["Bench"], Any], *, needs_s: float) -> None:
        """Run one part and write its result; one that fails, or has no time left, leaves the others alone."""
        left = self.deadline - time.monotonic()
        if left < needs_s:
            self.leave_out(f"{name}: {left:.0f} s were left, it needs {needs_s:.0f} s")
        else:
            print(f"--- {name}, {left:.0f} s left", flush=True)
            self.running = name
            try:
                self.found[name] = run(self)
            except Exception as error:
                traceback.print_exc()
                self.found["failed"].append(f"{name}: {_short(error)}")
        self.write()
        if self.clock.is_gpu:
            torch.cuda.empty_cache()

    def leave_out(self, what: str) -> None:
        self.found["left_out"].append(what)
        print(what, flush=True)

    def write(self) -> None:
        self.output.write_text(json.dumps(self.found, indent=2) + "\n")

    def is_good(self) -> bool:
        return not self.found["failed"] and self.found["tests"] in ("passed", "not run")

    @contextmanager
    def ended_in_time(self):
        """Inside, the whole program ends at the deadline, with what was found so far in the file."""

        def end() -> None:
            self.leave_out(f"{self.running}: not done at the deadline")
            self.write()
            os._exit(0 if self.is_good() else 1)

        timer = threading.Timer(max(0.0, self.deadline - time.monotonic()), end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]


def statistics_of(times: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2
    return {"median_s": statistics.median(times), "min_s": min(times), "quartiles_s": quartiles}


def relative_error(candidate: Candidate, x: Tensor) -> float:
    truth = x.float() @ candidate.weight.float().t()
    return ((candidate.multiply(x).float() - truth).norm() / truth.norm()).item()


def copy_bandwidth(bench: Bench) -> dict[str, Any]:
    """Bytes per second, read and written, of copying memory far larger than any cache."""
    source = torch.empty(bench.sizes.copy_bytes, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    times = bench.clock.seconds({"copy": lambda: target.copy_(source)}, bench.sizes.repeats)["copy"]
    gb_per_s = 2 * source.nbytes / statistics.median(times) / 1e9
    print(f"copying: {gb_per_s:.0f} GB/s", flush=True)
    return statistics_of(times) | {"gb_per_s": gb_per_s}


def dequantizing(bench: Bench) -> list[dict[str, Any]]:
    """Bytes per second, stored ones read and dense ones written, of dequantizing to float16."""
    rows = []
    for out_features, in_features in bench.sizes.shapes:
        ways: dict[str, Callable[[], Tensor]] = {}
        nbytes: dict[str, int] = {}
        for nbits in (4, 3, 2, 8):
            tensors = hqq_tensors(out_features, in_features, nbits, bench.device)
            ways[f"HQQ {nbits}-bit"] = lambda tensors=tensors, nbits=nbits, in_features=in_features: hqq_dequantize(
                *tensors, nbits, 1, in_features, torch.float16
            )
            nbytes[f"HQQ {nbits}-bit"] = sum(part.nbytes for part in tensors)
            truth = dequantize_hqq_reference(*tensors, nbits=nbits, axis=1, in_features=in_features)
            refuse_wrong_weight(f"HQQ {nbits}-bit", ways[f"HQQ {nbits}-bit"](), truth)
        for name, scheme in {"AQLM 2x8": (2, 8), "AQLM 1x16": (1, 16)}.items():
            tensors = aqlm_tensors(out_features, in_features, *scheme, bench.device)
            ways[name] = lambda tensors=tensors: aqlm_dequantize(*tensors, torch.float16)
            nbytes[name] = sum(part.nbytes for part in tensors)
            refuse_wrong_weight(name, ways[name](), dequantize_aqlm_reference(*tensors))
        del truth
        for name, times in bench.clock.seconds(ways, bench.sizes.repeats).items():
            gb_per_s = (nbytes[name] + 2 * out_features * in_features) / statistics.median(times) / 1e9
            rows.append({"shape": [out_features, in_features], "method": name, "gb_per_s": gb_per_s})
            rows[-1] |= statistics_of(times)
            print(f"dequantizing {out_features} x {in_features}  {name:12} {gb_per_s:8.1f} GB/s", flush=True)
    return rows


def refuse_wrong_weight(name: str, dense: Tensor, truth: Tensor) -> None:
    if not torch.equal(dense, truth.to(dense.dtype)):
        raise WrongResult(f"{name}: the dense weight is not that of the reference")


def checked_peers(bench: Bench, peers: dict, shape: tuple[int, int], refused: list[dict]) -> dict[str, tuple]:
    """(dtype, layer) of the peers that are installed, run and are right; the others' reasons go to ``refused``."""
    found = {}
    for name, (dtype, make) in peers.items():
        try:
            candidate = make(*shape, bench.device)
            errors = [
                relative_error(candidate, torch.randn(n, shape[1], device=bench.device).to(dtype))
                for n in (1, max(bench.sizes.tokens))
            ]
        except Exception as error:  # whatever a package of others raises is its result
            refused.append({"shape": list(shape), "method": name, "error": _short(error)})
            print(f"{name}: {refused[-1]['error']}", flush=True)
            continue
        if max(errors) < candidate.tolerance:
            found[name] = (dtype, _without_weight(candidate))
        else:
            refused.append({"shape": list(shape), "method": name, "error": f"off by {max(errors):.1e}"})
            print(f"{name}: {refused[-1]['error']}", flush=True)
    return found


def _without_weight(candidate: Candidate) -> Candidate:
    return dataclasses.replace(candidate, weight=torch.empty(0))


def checked_ours(
    bench: Bench, shape: tuple[int, int], *, only_dense: bool = False, tokens: tuple[int, ...] | None = None
) -> dict[str, tuple]:
    """(dtype, layer) of ours, the dense one first, which are right with each number of ``tokens``."""
    found = {}
    for name, candidate in islice(ours(*shape, bench.device), 1 if only_dense else None):
        for n_tokens in tokens or (*bench.sizes.tokens, gpu.MAX_TOKENS, gpu.MAX_TOKENS + 1):
            error = relative_error(candidate, torch.randn(n_tokens, shape[1], device=bench.device).half())
            if not error < max(candidate.tolerance, 1e-2):
                raise WrongResult(f"{name}: the product of {n_tokens} tokens is off by {error:.1e}")
        found[name] = (torch.float16, _without_weight(candidate))
    return found


def decoding(bench: Bench, peers: dict, *, with_ours: bool) -> dict[str, list[dict[str, Any]]]:
    """Seconds of each layer for 1 to 16 tokens."""
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for shape in bench.sizes.shapes:
        layers = checked_ours(bench, shape, only_dense=not with_ours)
        layers |= checked_peers(bench, peers, shape, refused)
        for n_tokens in bench.sizes.tokens:
            inputs = {
                dtype: torch.randn(n_tokens, shape[1], device=bench.device).to(dtype) for dtype, _ in layers.values()
            }
            ways = {
                name: lambda layer=layer, x=inputs[dtype]: layer.multiply(x) for name, (dtype, layer) in layers.items()
            }
            seconds = bench.clock.seconds(ways, bench.sizes.repeats)
            dense = statistics.median(seconds["dense float16"])
            for name, times in seconds.items():
                median = statistics.median(times)
                row = {
                    "shape": list(shape),
                    "tokens": n_tokens,
                    "method": name,
                    **statistics_of(times),
                    "rate_vs_dense_float16": dense / median,
                    "gb_per_s": layers[name][1].nbytes / median / 1e9,
                    "host_s": bench.clock.host_seconds(ways[name], bench.sizes.repeats) if n_tokens == 1 else None,
                }
                rows.append(row)
                print(
                    f"{shape[0]:5} x {shape[1]:5}  {n_tokens:2} tokens  {name:22} {1e6 * median:8.1f} us  "
                    f"{dense / median:5.2f} x dense  {row['gb_per_s']:7.1f} GB/s",
                    flush=True,
                )
    return {"rows": rows, "refused": refused}


@contextmanager
def patched(module: Any, name: str, value: Any):
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def switch_points(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of decoding into registers, and of dequantizing to memory, for rising numbers of tokens.

    ``gpu.MAX_TOKENS`` is to be chosen from these.
    """
    rows = []
    for shape in bench.sizes.shapes:
        layers = {}
        for max_tokens in (0, 1 << 30):  # both ways of each
            with patched(gpu, "MAX_TOKENS", max_tokens):
                checked = checked_ours(bench, shape, tokens=bench.sizes.sweep_tokens)
            layers = {name: layer for name, (_, layer) in checked.items()}
        for n_tokens in bench.sizes.sweep_tokens:
            x = torch.randn(n_tokens, shape[1], device=bench.device).half()

            def run(candidate: Candidate, max_tokens: int, x: Tensor = x) -> Tensor:
                with patched(gpu, "MAX_TOKENS", max_tokens):
                    return candidate.multiply(x)

            ways: dict[str, Callable[[], Tensor]] = {
                "dense float16": lambda x=x, layers=layers: layers["dense float16"].multiply(x)
            }
            for name in ("HQQ 4-bit", "HQQ 3-bit", "AQLM 2x8", "AQLM 1x16"):
                for how, max_tokens in {"in registers": 1 << 30, "to memory": 0}.items():
                    ways[f"{name}, {how}"] = lambda c=layers[name], m=max_tokens, run=run: run(c, m)
            for name, times in bench.clock.seconds(ways, bench.sizes.repeats // 2 + 1).items():
                rows.append({"shape": list(shape), "tokens": n_tokens, "method": name, **statistics_of(times)})
                print(f"{shape}  {n_tokens:4} tokens  {name:24} {1e6 * rows[-1]['median_s']:9.1f} us", flush=True)
    return rows


def tile_sizes(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of a large batch by the size of a tile, to choose ``tiled.device_tile_elements`` from."""
    rows = []
    for shape in bench.sizes.shapes:
        for n_elements in bench.sizes.tile_elements:
            with patched(tiled, "device_tile_elements", lambda device, n=n_elements: n):
                checked = checked_ours(bench, shape, tokens=(bench.sizes.tile_tokens,))
        layers = {name: layer for name, (_, layer) in checked.items()}
        x = torch.randn(bench.sizes.tile_tokens, shape[1], device=bench.device).half()

        def run(candidate: Candidate, n_elements: int, x: Tensor = x) -> Tensor:
            with patched(tiled, "device_tile_elements", lambda device, n=n_elements: n):
                return candidate.multiply(x)

        ways: dict[str, Callable[[], Tensor]] = {
            "dense float16": lambda x=x, layers=layers: layers["dense float16"].multiply(x)
        }
        for n_elements in bench.sizes.tile_elements:
            ways[f"HQQ 4-bit, tiles of {n_elements}"] = lambda c=layers["HQQ 4-bit"], n=n_elements, run=run: run(c, n)
        for name, times in bench.clock.seconds(ways, bench.sizes.repeats // 3 + 1).items():
            rows.append({"shape": list(shape), "tokens": bench.sizes.tile_tokens, "method": name})
            rows[-1] |= statistics_of(times)
            print(
                f"{shape}  {bench.sizes.tile_tokens} tokens  {name:30} {1e3 * rows[-1]['median_s']:8.3f} ms",
                flush=True,
            )
    return rows


def forms(bench: Bench) -> list[dict[str, Any]]:
    """Seconds of products in the form of the kernel that was measured to be the fastest, and in the first of all."""
    rows = []
    for shape in bench.sizes.shapes:
        layers = checked_ours(bench, shape, tokens=bench.sizes.form_tokens)
        for n_tokens in bench.sizes.form_tokens:
            x = torch.randn(n_tokens, shape[1], device=bench.device).half()

            def in_first_form(candidate: Candidate, x: Tensor = x) -> Tensor:
                with patched(gpu_tuning, "fastest", lambda kernel, facts, forms, product, *, like: forms[0]):
                    return candidate.multiply(x)

            ways: dict[str, Callable[[], Tensor]] = {}
            for name in ("HQQ 4-bit", "HQQ 3-bit", "HQQ 2-bit", "AQLM 2x8", "AQLM 1x16"):
                candidate = layers[name][1]
                ways[name] = lambda candidate=candidate, x=x: candidate.multiply(x)
                ways[f"{name}, first form"] = lambda candidate=candidate, run=in_first_form: run(candidate)
            for name, times in bench.clock.seconds(ways, bench.sizes.repeats).items():
                rows.append({"shape": list(shape), "tokens": n_tokens, "method": name, **statistics_of(times)})
                print(f"{shape}  {n_tokens:3} tokens  {name:24} {1e6 * rows[-1]['median_s']:9.1f} us", flush=True)
    bench.found["chosen_forms"] = gpu_tuning.chosen()
    return rows


def quantizing(bench: Bench) -> dict[str, Any]:
    """Weights per second of one large layer, ours without and with a Hessian, and the ``hqq`` package's."""
    shape = bench.sizes.quantized_shape
    weight = torch.randn(shape, device=bench.device) / 50
    inputs = torch.randn(512, shape[1], device=bench.device)
    statistics = InputStatistics(n_tokens=len(inputs), second_moment=inputs.t() @ inputs / len(inputs))
    hessian = statistics.hessian(damping=0.05, shrinkage=0.5)
    refused: list[dict[str, Any]] = []
    ways: dict[str, Callable[[], Any]] = {}
    for name, config in {
        "HQQ 4-bit": pql.HQQConfig(nbits=4),
        "HQQ 3-bit": pql.HQQConfig(nbits=3),
        "HQQ 2-bit": pql.HQQConfig(nbits=2),
        "AQLM 2x8": pql.AQLMConfig(),
    }.items():
        spec = config.spec_for("weight")
        method = get_method(spec.method)
        plain_error = None
        for suffix, known in {"": None, ", calibrated": hessian}.items():

            def quantize(known: Tensor | None = known, method: Any = method, spec: Any = spec) -> Any:
                return method.quantize(weight, spec, hessian=known)

            off = method.dequantize(quantize()) - weight
            error = ((off @ hessian) * off).sum().item() / ((weight @ hessian) * weight).sum().item()
            if not error < (0.5 if plain_error is None else 1.05 * plain_error):
                raise WrongResult(f"{name}{suffix}: the output error of the quantized weight is {error:.2f}")
            plain_error = error
            ways[name + suffix] = quantize
    try:
        from _peers import peer_weight, quantize_with_hqq

        def peer() -> Any:
            return quantize_with_hqq(weight, nbits=4, group_size=GROUP_SIZE, axis=1, device=bench.device)

        error = ((peer_weight(*peer()).dense - weight).norm() / weight.norm()).item()
        if not error < 0.2:
            raise WrongResult(f"the error of the quantized weight is {error:.2f}")
        ways["hqq package 4-bit"] = peer
    except Exception as error:  # whatever a package of others raises is its result
        refused.append({"method": "hqq package 4-bit", "error": _short(error)})
    seconds = bench.clock.seconds(ways, bench.sizes.quantizing_rounds, n_warmups=0)
    return {"rows": [quantized_row(name, shape, times) for name, times in seconds.items()], "refused": refused}


def quantized_row(name: str, shape: tuple[int, int], times: list[float]) -> dict[str, Any]:
    row = {"shape": list(shape), "method": name, **statistics_of(times)}
    row["million_weights_per_s"] = shape[0] * shape[1] / row["median_s"] / 1e6
    print(f"quantizing {shape}  {name:24} {row['million_weights_per_s']:9.1f} million weights/s", flush=True)
    return row


def stack(bench: Bench) -> nn.Module:
    """Layers of the shape of Llama 3 8B, bfloat16, random."""
    sizes = bench.sizes
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=max(tokens for _, tokens in sizes.batches),
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device(bench.device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def _linears(model: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    return [
        (parent, name, child)
        for parent in model.model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.Linear)
    ]


def quantized_stack(bench: Bench, config: pql.QuantConfig) -> nn.Module:
    """The stack with random codes: a step takes the same time with others."""
    model = stack(bench)
    for parent, name, linear in _linears(model):
        layer = QuantizedLinear.empty(
            config.spec_for(name),
            out_features=linear.out_features,
            in_features=linear.in_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            device=bench.device,
            layer_name=name,
        )
        for tensor_name, tensor in layer.quantized_weight.tensors.items():
            if tensor.is_floating_point():
                # Weights of about 0.02, whatever the method.
                low, high = {"zero": (0, 15), "scales": (1, 2)}.get(tensor_name, (-0.01, 0.01))
                tensor.uniform_(low, high)
            else:
                limits = torch.iinfo(tensor.dtype)
                tensor.random_(limits.min, limits.max + 1)
        setattr(parent, name, layer)
    return model


def nf4_stack(bench: Bench) -> nn.Module:
    import bitsandbytes as bnb

    model = stack(bench)
    for parent, name, linear in _linears(model):
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        setattr(parent, name, layer.to(bench.device))
    model.is_loaded_in_4bit = True
    return model


def adapted(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=16, target_modules=targets, init_lora_weights=False), autocast_adapter_dtype=False
    ).train()


def refuse_wrong_gradients(model: nn.Module, ids: Tensor) -> None:
    """Compare loss and adapter gradients with those over plain dense layers that hold the dequantized weights."""
    dense = pql.dequantize_model(copy.deepcopy(model))
    found = []
    for candidate in (model, dense):
        loss = candidate(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append([loss.detach(), *[p.grad for p in candidate.parameters() if p.grad is not None]])
        candidate.zero_grad()
    for result, expected in zip(*found, strict=True):
        error = (result - expected).float().norm() / expected.float().norm()
        if not error < 5e-2:
            raise WrongResult(f"a gradient of the quantized model is off by {error:.2e}")


def training(bench: Bench) -> dict[str, Any]:
    """Seconds and peak memory of one LoRA training step: forward, backward and AdamW."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense bfloat16": lambda: stack(bench),
        "HQQ 4-bit": lambda: quantized_stack(bench, pql.HQQConfig(nbits=4)),
        "HQQ 4-bit, fused projections": lambda: quantized_stack(bench, pql.HQQConfig(nbits=4)),
        "AQLM 2x8": lambda: quantized_stack(bench, pql.AQLMConfig()),
        "bitsandbytes NF4": lambda: nf4_stack(bench),
    }
    refused, models = [], {}
    for name, make in makers.items():
        try:
            models[name] = adapted(make())
            if name.endswith("fused projections"):
                pql.fuse_projections(models[name])
            ids = torch.randint(0, bench.sizes.vocabulary, (1, 16), device=bench.device)
            models[name](input_ids=ids, labels=ids).loss.backward()
            models[name].zero_grad()
        except Exception as error:
            models.pop(name, None)
            if name != "bitsandbytes NF4":
                raise
            refused.append({"model": name, "error": _short(error)})
            print(f"{name}: {refused[-1]['error']}", flush=True)
        else:
            if name.startswith(("HQQ", "AQLM")):
                refuse_wrong_gradients(models[name], ids)
    optimizers = {
        name: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
        for name, model in models.items()
    }
    rows = []
    for batch, tokens in bench.sizes.batches:
        ids = torch.randint(0, bench.sizes.vocabulary, (batch, tokens), device=bench.device)

        def step(name: str, ids: Tensor = ids) -> None:
            models[name](input_ids=ids, labels=ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()

        peaks = {name: peak_of_step(bench, step, name) for name in models}
        seconds = bench.clock.seconds(
            {name: lambda name=name, step=step: step(name) for name in models}, bench.sizes.steps
        )
        dense = statistics.median(seconds["dense bfloat16"])
        for name, times in seconds.items():
            weights = sum(p.nbytes for p in models[name].parameters())
            row = {"model": name, "batch": batch, "tokens": tokens, **statistics_of(times)}
            row |= {
                "rate_vs_dense_bfloat16": dense / row["median_s"],
                "model_bytes": weights,
                "peak_bytes": peaks[name],
            }
            rows.append(row)
            print(
                f"{batch} x {tokens} tokens  {name:18} {1e3 * row['median_s']:8.1f} ms  "
                f"{row['rate_vs_dense_bfloat16']:5.2f} x dense  model {weights / 2**30:5.2f} GiB, "
                f"a step {peaks[name] / 2**30:6.2f} GiB above all models",
                flush=True,
            )
    return {"rows": rows, "refused": refused, "layers": bench.sizes.layers}


def generating(bench: Bench) -> dict[str, Any]:
    """Seconds of one token through the stack with a static cache: launched by Python, and replayed as a CUDA graph."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "dense bfloat16": lambda: stack(bench),
        "HQQ 4-bit": lambda: quantized_stack(bench, pql.HQQConfig(nbits=4)),
        "HQQ 4-bit + LoRA": lambda: adapted(quantized_stack(bench, pql.HQQConfig(nbits=4))),
        "HQQ 2-bit": lambda: quantized_stack(bench, pql.HQQConfig(nbits=2)),
        "AQLM 2x8": lambda: quantized_stack(bench, pql.AQLMConfig()),
        "bitsandbytes NF4": lambda: nf4_stack(bench),
    }
    refused: list[dict[str, Any]] = []
    ways: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, make in makers.items():
        try:
            step = one_token_step(bench, make().eval())
            step()
        except Exception as error:
            refused.append({"model": name, "error": _short(error)})
            print(f"{name}: {refused[-1]['error']}", flush=True)
            if name != "bitsandbytes NF4":
                bench.found["failed"].append(f"generating, {name}: {_short(error)}")
            continue
        ways[name, "eager"] = step
        if bench.clock.is_gpu:
            try:
                ways[name, "graph"] = as_graph(step)
            except Exception as error:  # of the capture: the step waits for the host somewhere
                refused.append({"model": f"{name}, graph", "error": _short(error)})
                print(f"{name}, graph: {refused[-1]['error']}", flush=True)
    named = {", ".join(key): way for key, way in ways.items()}
    seconds = bench.clock.seconds(named, bench.sizes.repeats)
    rows = []
    for (name, how), way in ways.items():
        row = {"model": name, "how": how, **statistics_of(seconds[f"{name}, {how}"])}
        row["host_s"] = bench.clock.host_seconds(way, bench.sizes.steps)
        rows.append(row)
        print(
            f"one token, {name:18} {how:6} {1e3 * row['median_s']:8.3f} ms, of the host {1e3 * row['host_s']:8.3f} ms",
            flush=True,
        )
    return {"rows": rows, "refused": refused, "layers": bench.sizes.layers, "cached_tokens": bench.sizes.cached_tokens}


def one_token_step(bench: Bench, model: nn.Module) -> Callable[[], Tensor]:
    """One token through ``model``, always at the same place of a static cache."""
    cache = StaticCache(config=model.config, max_cache_len=bench.sizes.cached_tokens)
    ids = torch.zeros(1, 1, dtype=torch.int64, device=bench.device)
    places = torch.full_like(ids, bench.sizes.cached_tokens // 2)
    # In place of the mask that transformers would make of the cache's state: all of it is seen.
    mask = torch.zeros(1, 1, 1, bench.sizes.cached_tokens, dtype=torch.bfloat16, device=bench.device)

    def step() -> Tensor:
        cache.reset()
        return model(input_ids=ids, position_ids=places, attention_mask=mask, past_key_values=cache).logits

    return step


def as_graph(step: Callable[[], Any]) -> Callable[[], None]:
    """``step`` recorded as a CUDA graph, to be replayed."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def loading(bench: Bench) -> list[dict[str, Any]]:
    """Seconds from a folder to a model on the device: the stack in bfloat16, and quantized; and how to get there."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        dense, quantized = Path(scratch, "dense"), Path(scratch, "quantized")
        model = stack(bench)
        model.save_pretrained(dense)
        pql.save_model(pql.quantize_model(model, pql.HQQConfig(nbits=4), progress=False), quantized)
        del model
        ways: dict[str, tuple[Path, dict[str, Any]]] = {
            "dense bfloat16": (dense, {}),
            "HQQ 4-bit": (quantized, {}),
            "dense bfloat16, quantized to HQQ 4-bit": (dense, {"quantization_config": pql.HQQConfig(nbits=4)}),
        }
        for name, (folder, options) in ways.items():
            seconds = []
            for _ in range(bench.sizes.loadings):
                start = time.perf_counter()
                loaded = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.bfloat16, device_map=bench.device, **options
                )
                bench.clock.wait()
                seconds.append(time.perf_counter() - start)
                del loaded
            nbytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            rows.append({"model": name, "bytes": nbytes, **statistics_of(seconds)})
            print(f"loading {name:40} {nbytes / 1e9:.2f} GB in {rows[-1]['median_s']:.2f} s", flush=True)
    return rows


def peak_of_step(bench: Bench, step: Callable[[str], None], name: str) -> int:
    """Bytes that a step needs above what all the models hold."""
    step(name)
    if not bench.clock.is_gpu:
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(name)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def run_tests(device: str, timeout_s: float) -> str:
    """The outcome of the tests. Failures end nothing: each product is checked again before it is timed."""
    # Without measuring forms: each would be compiled.
    environment = os.environ | {"QUANTLAYERS_TEST_DEVICE": device, gpu_tuning.SWITCH: "off"}
    command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "tests/gpu"]
    try:
        passed = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout_s).returncode == 0
    except subprocess.TimeoutExpired:
        return f"not done after {timeout_s:.0f} s"
    return "passed" if passed else "failed"


def installed(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a test of this program")
    parser.add_argument("--seconds", type=float, default=440, help="for tests and parts together")
    parser.add_argument("--no-tests", action="store_true", help="time without testing first")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU that this torch can use: nothing was measured.")
    if args.device == "cpu" and args.output == RESULTS:
        raise SystemExit("figures of a CPU do not belong there: give an --output.")
    deadline = time.monotonic() + args.seconds
    tests = "not run" if args.no_tests else run_tests(args.device, args.seconds / 2)
    torch.manual_seed(0)
    random.seed(0)
    device = describe_device() | {name: installed(name) for name in VERSIONS} | {"kernels": kernels_of(args.device)}
    bench = Bench(
        device=args.device,
        sizes=TINY if args.tiny else Sizes(),
        deadline=deadline,
        output=args.output,
        clock=Clock(args.device),
        found={"device": device, "tests": tests, "failed": [], "left_out": []},
    )
    print(json.dumps(device), flush=True)
    with bench.ended_in_time():
        with torch.no_grad():
            bench.part("copying", copy_bandwidth, needs_s=5)
            bench.part("decoding", lambda bench: decoding(bench, PEERS, with_ours=True), needs_s=30)
            bench.part("dequantizing", dequantizing, needs_s=10)
            bench.part("generating", generating, needs_s=30)
        bench.part("training", training, needs_s=40)
        with torch.no_grad():
            bench.part("forms", forms, needs_s=30)
            bench.part("switch_points", switch_points, needs_s=30)
            bench.part("tile_sizes", tile_sizes, needs_s=20)
            bench.part("quantizing", quantizing, needs_s=30)
            bench.part("loading", loading, needs_s=20)
            bench.part("decoding_slow_peers", lambda bench: decoding(bench, SLOW_PEERS, with_ours=False), needs_s=100)
    if not bench.is_good():
        raise SystemExit(f"tests: {tests}; failed: {bench.found['failed']}")


def kernels_of(device: str) -> str:
    return "triton" if device != "cpu" and gpu.is_available() else "plain torch"


if __name__ == "__main__":
    main()
