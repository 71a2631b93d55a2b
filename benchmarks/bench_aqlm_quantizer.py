"""AQLM quantizing layer by layer: seconds, and the error of the outputs on text that was not calibrated on.

Layers of SmolLM2-135M, two codebooks of 8 bits on groups of 8 inputs. Their inputs are those of the float model:
16k tokens of the text's second half to calibrate on, 8k of its beginning to measure the error on. Seconds are CPU
time on one thread, so that other work on the machine does not count; the best of ``--repeats`` runs.

``--research-code FOLDER`` measures AQLM's own quantizer too, on the same weights and second moments, with the settings
of its command line (a tolerance of 0.01, as in its README): FOLDER is a checkout of
https://github.com/Vahe1994/AQLM, which is on no package index. It needs minutes for each of the larger layers.

``--large`` quantizes one layer of 4096 x 14336 in a process of its own, and measures time and memory.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _demo_model import demo_model_folder
from _device import describe_device
from _memory import extra_memory_of
from bench_quality import TEXT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.calibration import InputStatistics
from peft_quantlayers.methods import get_method
from quantlayers_kernels import native

RESULTS = Path(__file__).parent / "results" / "aqlm_quantizer.json"
LAYERS = ["12.self_attn.k_proj", "12.self_attn.q_proj", "2.self_attn.o_proj", "12.mlp.gate_proj", "12.mlp.down_proj"]
LARGE = (4096, 14336)
HELD_OUT_TOKENS = 8192
SPEC = pql.AQLMSpec()
RESEARCH_SETTINGS = {
    "init_max_iter": 100,
    "init_max_points_per_centroid": None,
    "lr": 1e-4,
    "max_epochs": 1000,
    "steps_per_epoch": 100,
    "relative_mse_tolerance": 0.01,
    "beam_size": 1,
    "codebook_value_nbits": 16,
    "codebook_value_num_groups": 1,
    "scale_nbits": 0,
}


def second_moments(model: nn.Module, names: list[str], batches: list[Tensor]) -> dict[str, Tensor]:
    """Mean of ``x x.T`` over the inputs of each layer."""
    moments = {name: torch.zeros(()) for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, 1)
            moments[name] = moments[name] + x.t() @ x

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model.model(batch)
    for handle in handles:
        handle.remove()
    return {name: moment / sum(batch.numel() for batch in batches) for name, moment in moments.items()}


def output_error(quantized: Tensor, weight: Tensor, moment: Tensor) -> float:
    """Squared error of the outputs, relative to their size."""
    difference = quantized - weight
    return float(((difference @ moment) * difference).sum() / ((weight @ moment) * weight).sum())


def ours(weight: Tensor, hessian: Tensor | None) -> Tensor:
    method = get_method(SPEC.method)
    return method.dequantize(method.quantize(weight, SPEC, hessian=hessian))


def research_code(weight: Tensor, moment: Tensor) -> Tensor:
    """What AQLM's own engine makes of the weight; its folder must be in ``sys.path``."""
    from aq_engine import AQEngine

    random.seed(0)
    torch.manual_seed(0)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    engine = AQEngine(linear)
    engine.XTX.copy_(moment)
    scheme = {name: getattr(SPEC, name) for name in ("num_codebooks", "nbits_per_codebook")}
    scheme |= {name: getattr(SPEC, name) for name in ("in_group_size", "out_group_size")}
    settings = {"devices": [torch.device("cpu")], "print_frequency": 1 << 30, **scheme, **RESEARCH_SETTINGS}
    return engine.quantize(args=Namespace(**settings), verbose=False)().detach()


def measure(make: Callable[[], Tensor], weight: Tensor, held_out: Tensor, repeats: int) -> dict[str, Any]:
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        quantized = make()
        seconds.append(time.process_time() - began)
    return {
        "shape": list(weight.shape),
        "seconds": min(seconds),
        "million_weights_per_s": weight.numel() / min(seconds) / 1e6,
        "held_out_error": output_error(quantized, weight, held_out),
    }


def measure_layers(names: list[str], folder: Path | None, repeats: int) -> list[dict[str, Any]]:
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(demo_model_folder())(TEXT.read_text(), return_tensors="pt").input_ids[0]
    calibration = pql.Calibration(data=ids[len(ids) // 2 :])
    held_out = list(ids[:HELD_OUT_TOKENS].view(-1, calibration.sequence_length).split(calibration.batch_size))
    paths = {name: f"model.layers.{name}" for name in names}
    moments = second_moments(model, list(paths.values()), calibration.batches(model))
    held_out_moments = second_moments(model, list(paths.values()), held_out)

    rows = []
    for name, path in paths.items():
        weight = model.get_submodule(path).weight.detach().clone()
        moment, other = moments[path], held_out_moments[path]
        statistics = InputStatistics(n_tokens=calibration.n_tokens, second_moment=moment)
        hessian = statistics.hessian(damping=calibration.damping, shrinkage=calibration.used_shrinkage)
        ways: dict[str, tuple[Callable[[], Tensor], int]] = {
            "ours": (lambda w=weight, h=hessian: ours(w, h), repeats),
            "ours, without calibration": (lambda w=weight: ours(w, None), repeats),
        }
        if folder is not None:
            ways["research code"] = (lambda w=weight, m=moment: research_code(w, m), 1)
        for made_by, (make, times) in ways.items():
            row = {"layer": name, "made_by": made_by, **measure(make, weight, other, times)}
            if not row["held_out_error"] < 0.5:
                raise SystemExit(
                    f"{name}, {made_by}: an error of {row['held_out_error']}, which is no quantized weight."
                )
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def measure_large() -> list[dict[str, Any]]:
    """Time and memory above the float weight, without calibration and with a second moment of random inputs."""
    method, rows = get_method(SPEC.method), []
    weight = torch.empty(LARGE).normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    inputs = torch.randn(512, LARGE[1], generator=torch.Generator().manual_seed(1))
    method.quantize(weight[:64, :512].contiguous(), SPEC)  # code and threads are there now
    for is_calibrated in (False, True):
        statistics = InputStatistics(n_tokens=len(inputs), second_moment=inputs.t() @ inputs / len(inputs))
        hessian = statistics.hessian(damping=0.05, shrinkage=0.5) if is_calibrated else None
        began = time.process_time()
        measured = extra_memory_of(lambda h=hessian: method.quantize(weight, SPEC, hessian=h))
        row = {
            "is_calibrated": is_calibrated,
            "cpu_seconds": time.process_time() - began,
            "weight_mib": weight.nbytes / (1 << 20),
            "extra_peak_mib": measured["extra_peak_mib"],
        }
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def in_own_process() -> list[dict[str, Any]]:
    done = subprocess.run([sys.executable, __file__, "--large-here"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--research-code", type=Path, help="a checkout of AQLM's repository")
    parser.add_argument("--large", action="store_true", help="one layer of 4096 x 14336 only; the other rows stay")
    parser.add_argument("--large-here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.large_here:
        print(json.dumps(measure_large()))
        return

    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "large": []}
    if args.large:
        result["large"] = in_own_process()
    else:
        if args.research_code is not None:
            sys.path.insert(0, str(args.research_code.resolve()))
        result["rows"] = measure_layers(args.layers, args.research_code, args.repeats)
    kernels = native.VARIANTS[native.variant()] if native.is_available() else "plain torch"
    result |= {
        "device": describe_device() | {"kernels": kernels},
        "spec": SPEC.to_dict(),
        "calibration_tokens": pql.Calibration(data="").n_tokens,
        "held_out_tokens": HELD_OUT_TOKENS,
        "research_settings": RESEARCH_SETTINGS,
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
