"""CPU time of quantizing, decoding, LoRA steps and calibration in two checkouts, in turns of single calls.

    python benchmarks/bench_rebuild.py BEFORE

BEFORE is a checkout of an older commit, its compiled kernels built. One process for each checkout holds small cases of
``bench_quantize``, ``bench_decode``, ``bench_lora_step`` and ``bench_calibration``; in every round each case is called
in one process and then in the other, so that whatever else the machine does slows both. One thread, whose CPU time
counts. Rows of float layers, which the package does not touch, show how much of a difference is noise.
"""

import argparse
import copy
import dataclasses
import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "rebuild.json"
ROUNDS = {"quantize": 25, "decode": 25, "lora_step": 25, "calibration": 8}
# A turn calls a quick case until this time is over.
SECONDS_OF_A_TURN = 0.02
AQLM = pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=8, rounds=0, beam=1)
N_BLOCKS, VOCABULARY, BATCH, LENGTH = 4, 1024, 2, 64

Cases = dict[str, Callable[[], object]]


def random_weight(shape: tuple[int, int]) -> Tensor:
    return torch.empty(shape).normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def quantize_cases() -> Cases:
    """Single weights; the call of the method, without a layer around it."""
    package = "methods" if (Path(pql.__file__).parent / "methods").exists() else "quantizers"
    method = import_module(f"peft_quantlayers.{package}").get_method("hqq")
    # Methods gave their layer a name in messages, before layers did that.
    name = {"name": "weight"} if "name" in inspect.signature(method.quantize).parameters else {}
    cases: Cases = {}
    for shape in ((1536, 576), (2048, 2048)):
        weight = random_weight(shape)
        for nbits in (8, 4, 3, 2):
            for axis in (0, 1):
                spec = pql.HQQSpec(nbits=nbits, group_size=64, axis=axis)
                call = functools.partial(method.quantize, weight, spec, **name)
                cases[f"HQQ {nbits}-bit, axis {axis}, {shape[0]} x {shape[1]}"] = call
    return cases


def quantized_layer(shape: tuple[int, int], config: pql.QuantConfig | None) -> nn.Module:
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data = random_weight(shape)
    model = nn.Sequential(layer)
    return model if config is None else pql.quantize_model(model, config, progress=False)


def decode_cases() -> Cases:
    """Layers with few tokens, without gradients."""
    configs = {f"HQQ {nbits}-bit": pql.HQQConfig(nbits=nbits, group_size=64) for nbits in (8, 4, 3, 2)}
    cases: Cases = {}
    for name, config in ({"dense float32": None} | configs | {"AQLM 2x8": AQLM}).items():
        for shape in ((576, 576), (1536, 576) if name == "AQLM 2x8" else (4096, 4096)):
            layer = quantized_layer(shape, config)
            for tokens in (1, 4, 16, 128):
                x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(0))
                cases[f"{name}, {shape[0]} x {shape[1]}, {tokens} tokens"] = lambda layer=layer, x=x: layer(x)
    return {name: torch.no_grad()(call) for name, call in cases.items()}


def smollm2(folder: str, n_blocks: int) -> nn.Module:
    """The first blocks of SmolLM2, with the first tokens alone: the head would take most of the time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, num_hidden_layers=n_blocks)
    model.resize_token_embeddings(VOCABULARY)
    return model


def token_ids(*shape: int) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0))


def lora_step_cases(folder: str) -> Cases:
    """Forward, backward and AdamW of the first blocks of SmolLM2."""
    configs = {"dense float32": None, "HQQ 4-bit": pql.HQQConfig(nbits=4), "HQQ 2-bit": pql.HQQConfig(nbits=2)}
    ids = token_ids(BATCH, LENGTH)
    cases: Cases = {}
    for name, config in (configs | {"AQLM 2x8": AQLM}).items():
        model = smollm2(folder, N_BLOCKS)
        if config is not None:
            pql.quantize_model(model, config, progress=False)
        adapted = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW(p for p in adapted.parameters() if p.requires_grad)

        def step(adapted: nn.Module = adapted, optimizer: torch.optim.Optimizer = optimizer) -> None:
            adapted(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        cases[f"{name}, {BATCH} x {LENGTH} tokens"] = step
    return cases


def calibration_cases(folder: str) -> Cases:
    """Two blocks of SmolLM2, with the targets that both checkouts know."""
    fields = {field.name for field in dataclasses.fields(pql.Calibration)}
    first = {name: value for name, value in {"asymmetric_targets": False}.items() if name in fields}
    model = smollm2(folder, 2)

    def quantized(config: pql.QuantConfig, calibration: pql.Calibration | None) -> None:
        pql.quantize_model(copy.deepcopy(model), config, calibration=calibration, progress=False)

    calibration = pql.Calibration(data=token_ids(16_384), n_tokens=8192, sequence_length=256, **first)
    return {
        "HQQ 4-bit, without data": lambda: quantized(pql.HQQConfig(nbits=4), None),
        "HQQ 3-bit, 8,192 tokens": lambda: quantized(pql.HQQConfig(nbits=3), calibration),
    }


def serve(folder: str) -> None:
    """Time one turn of the case that a line on standard input names, and answer with seconds a call."""
    cases = {
        f"{benchmark}/{name}": call
        for benchmark, made in (
            ("quantize", quantize_cases()),
            ("decode", decode_cases()),
            ("lora_step", lora_step_cases(folder)),
            ("calibration", calibration_cases(folder)),
        )
        for name, call in made.items()
    }
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        call = cases[line.rstrip("\n")]
        n_calls, began = 0, time.process_time()
        while not n_calls or time.process_time() - began < SECONDS_OF_A_TURN:
            call()
            n_calls += 1
        print(json.dumps((time.process_time() - began) / n_calls), flush=True)


class Checkout:
    """A process that runs the cases with the code of one checkout."""

    def __init__(self, root: Path, folder: str) -> None:
        paths = os.pathsep.join((str(root), str(root / "kernels")))
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", folder],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cases: list[str] = self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def seconds_of(self, case: str) -> float:
        assert self._process.stdin is not None
        print(case, file=self._process.stdin, flush=True)
        return float(self._answer())


def measured(before: Checkout, after: Checkout, cases: list[str]) -> list[dict[str, Any]]:
    """A row for each case, from as many rounds as its benchmark takes; a first one warms up."""
    seconds: dict[str, tuple[list[float], list[float]]] = {case: ([], []) for case in cases}
    for turn in range(max(ROUNDS.values()) + 1):
        for case, times in seconds.items():
            if turn <= ROUNDS[case.partition("/")[0]]:
                turns = list(zip((before, after), times, strict=True))
                for checkout, kept in turns if turn % 2 else turns[::-1]:
                    taken = checkout.seconds_of(case)
                    if turn:
                        kept.append(taken)
    return [
        {
            "row": case.partition("/")[2],
            "rounds": len(old),
            "before_s": statistics.median(old),
            "after_s": statistics.median(new),
            "after_over_before": statistics.median(new) / statistics.median(old),
            "after_over_before_of_minima": min(new) / min(old),
        }
        for case, (old, new) in seconds.items()
    ]


def commit_of(root: Path) -> str:
    done = subprocess.run(["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path, help="an older checkout")
    parser.add_argument("--benchmarks", nargs="+", choices=ROUNDS, default=list(ROUNDS), help="only these rows again")
    args = parser.parse_args()
    sys.path[0:0] = [str(ROOT / "benchmarks")]
    from _cpu import kernels_in_use
    from _demo_model import demo_model_folder
    from _device import describe_device

    folder = str(demo_model_folder())
    before, after = Checkout(args.before.resolve(), folder), Checkout(ROOT, folder)
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    result = {
        "device": describe_device() | {"threads": 1, "kernels": kernels_in_use()},
        "before": commit_of(args.before),
        "after": commit_of(ROOT),
    }
    for benchmark in ROUNDS:
        cases = [case for case in after.cases if case.startswith(f"{benchmark}/")]
        result[benchmark] = measured(before, after, cases) if benchmark in args.benchmarks else kept[benchmark]
        for row in result[benchmark]:
            print(
                f"{benchmark:12} {row['row']:50} {1e3 * row['before_s']:9.3f} -> {1e3 * row['after_s']:9.3f} ms  "
                f"{row['after_over_before']:.3f}  (minima {row['after_over_before_of_minima']:.3f})",
                flush=True,
            )
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main()
