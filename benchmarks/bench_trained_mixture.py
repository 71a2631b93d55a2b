"""What quantization, LoRA and merging do to a mixture of experts that is really trained: loss, KL, routing.

A Qwen3-MoE of 7 M parameters is trained on WikiText-2 from a seed, for minutes on one core; ``--model FOLDER`` keeps
it for the next run, which goes on with the rows that the result file does not have. It is quantized plain and
calibrated; each base is compared with the float model on held-out text. LoRA on attention and experts is then trained
on Python code, merged by each strategy that applies, and compared with itself before the merge on held-out code.
Routing agreement is the fraction of tokens whose chosen experts are the same.

Last, AQLM with codebooks of each expert's own, and with codebooks that all experts of a stack share: each is quantized
without calibration and dequantized into the float model, whose attention stays float.
"""

import argparse
import copy
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _device import describe_device
from _trained_mixture import TARGETS, Text, new_mixture, texts, train
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.evaluate import capture, divergence, perplexity, routing_agreement
from peft_quantlayers.layers.expert_types import dense_stacks
from peft_quantlayers.methods import get_method

RESULTS = Path(__file__).parent / "results" / "trained_mixture.json"
TRAINING = "training.json"
WINDOW, WINDOWS = 256, 48
CALIBRATION_TOKENS = 32_768
RANK = 8
BASES: dict[str, pql.QuantConfig] = {
    "HQQ 4 bits, group 64": pql.HQQConfig(nbits=4, group_size=64),
    "HQQ 3 bits, group 64": pql.HQQConfig(nbits=3, group_size=64),
    "HQQ 2 bits, group 64": pql.HQQConfig(nbits=2, group_size=64),
    "HQQ 2 bits, group 16": pql.HQQConfig(nbits=2, group_size=16),
    "AQLM 2x8": pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=8),
}
TUNED = [name for name in BASES if name != "HQQ 2 bits, group 64"]
SHARING = {"2x8": (2, 8), "1x8": (1, 8)}


def trained(options: argparse.Namespace, prose: Text) -> tuple[Any, dict[str, Any]]:
    """The float model, of an earlier run or trained now, and how it was trained."""
    if options.model is not None and (options.model / TRAINING).exists():
        about = json.loads((options.model / TRAINING).read_text())
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval(), about
    began = time.process_time()
    model = train(new_mixture(seed=options.seed), prose.train, steps=options.steps, lr=2e-3, seed=options.seed)
    about = {"seed": options.seed, "steps": options.steps, "training_cpu_seconds": time.process_time() - began}
    if options.model is not None:
        model.save_pretrained(options.model)
        (options.model / TRAINING).write_text(json.dumps(about))
    return model, about


def bits_per_weight(model: nn.Module) -> float:
    """Of all quantized layers, branches included."""
    layers = pql.quantized_modules(model).values()
    sizes = [math.prod(layer.leading) * layer.in_features * layer.out_features for layer in layers]
    return sum(layer.bits_per_weight * n for layer, n in zip(layers, sizes, strict=True)) / sum(sizes)


def compared(model: Any, reference: Any, ids: Tensor) -> dict[str, Any]:
    """Perplexity, and divergence and routing agreement from ``reference``."""
    routing = routing_agreement(model, reference, ids, window=WINDOW, max_windows=WINDOWS, progress=False)
    return {
        "perplexity": perplexity(model, ids, window=WINDOW, max_windows=WINDOWS, progress=False),
        "kl": divergence(model, reference, ids, window=WINDOW, max_windows=WINDOWS, progress=False).kl,
        "routing": routing.total,
        "routing_per_layer": list(routing.per_layer.values()),
    }


def quantized(model: nn.Module, name: str, calibration: Tensor | None) -> nn.Module:
    given = None if calibration is None else pql.Calibration(data=calibration, n_tokens=CALIBRATION_TOKENS)
    return pql.quantize_model(copy.deepcopy(model), BASES[name], calibration=given, progress=False).eval()


def merges(model: Any, base: nn.Module, code: Text, config: pql.QuantConfig) -> Iterator[dict[str, Any]]:
    """Each strategy on a copy of the PEFT model ``model``, compared with it on held-out code."""

    def unadapted(ids: Tensor) -> Tensor:
        return base(ids, use_cache=False).logits

    for strategy in ["requantize", "calibrated", *(["append"] if isinstance(config, pql.AQLMConfig) else []), "keep"]:
        data = None
        if strategy in ("calibrated", "append"):
            data = pql.Calibration(data=code.train, n_tokens=CALIBRATION_TOKENS)
        merged: Any
        merged, _ = pql.merge_back(copy.deepcopy(model), strategy=strategy, calibration=data, progress=False)
        merged.eval()
        found = capture(
            lambda ids: model(ids, use_cache=False).logits,
            unadapted,
            lambda ids, merged=merged: merged(ids, use_cache=False).logits,
            code.held_out,
            window=WINDOW,
            max_windows=WINDOWS,
        )
        routing = routing_agreement(merged, model, code.held_out, window=WINDOW, max_windows=WINDOWS, progress=False)
        yield {
            "strategy": strategy,
            "bits_per_weight": bits_per_weight(merged),
            "loss_base": found.loss_base,
            "loss_adapter": found.loss_adapter,
            "loss_merged": found.loss_merged,
            "gain_retained": found.gain_retained,
            "capture": found.capture,
            "routing": routing.total,
            "routing_per_layer": list(routing.per_layer.values()),
        }


def tuned(base: nn.Module, code: Text, options: argparse.Namespace) -> Any:
    torch.manual_seed(options.seed)
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, **TARGETS)
    return train(get_peft_model(copy.deepcopy(base), lora), code.train, steps=options.tuning_steps, lr=2e-3)


def sharing(model: Any, prose: Text) -> Iterator[dict[str, Any]]:
    """AQLM on the experts only: codebooks of each expert's own, and shared by all of a stack."""
    method = get_method("aqlm")
    for name, (num_codebooks, nbits) in SHARING.items():
        spec = pql.AQLMSpec(num_codebooks=num_codebooks, nbits_per_codebook=nbits)
        for is_shared in (False, True):
            changed = copy.deepcopy(model)
            n_bits = n_weights = 0
            error = energy = 0.0
            with torch.no_grad():
                for _, module, entry in list(dense_stacks(changed)):
                    weight = entry.weight(module)
                    parts = [weight.flatten(0, 1)] if is_shared else list(weight.unbind(0))
                    made = [method.quantize(part, spec) for part in parts]
                    n_bits += sum(each.bits_per_weight * part.numel() for each, part in zip(made, parts, strict=True))
                    n_weights += weight.numel()
                    dense = torch.cat([method.dequantize(each) for each in made]).view_as(weight)
                    error += float((dense - weight).square().sum())
                    energy += float(weight.square().sum())
                    weight.copy_(dense)
            found = compared(changed, model, prose.held_out)
            yield {
                "setting": name,
                "is_shared": is_shared,
                "bits_per_weight": n_bits / n_weights,
                "weight_error": math.sqrt(error / energy),
                **found,
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tuning-steps", type=int, default=100)
    parser.add_argument("--model", type=Path, help="a folder to keep the trained model in, and to take it from")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prose, code = texts()
    model, about_training = trained(options, prose)
    result: dict[str, Any] = {
        "device": describe_device(),
        "command": "python benchmarks/bench_trained_mixture.py",
        **about_training,
        "tuning_steps": options.tuning_steps,
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "train_tokens": len(prose.train),
        "measured_tokens": WINDOWS * WINDOW,
        "float_perplexity": perplexity(model, prose.held_out, window=WINDOW, max_windows=WINDOWS, progress=False),
        "random_perplexity": perplexity(
            new_mixture(seed=options.seed), prose.held_out, window=WINDOW, max_windows=WINDOWS, progress=False
        ),
        "bases": [],
        "merges": [],
        "sharing": [],
    }
    if options.model is not None and RESULTS.exists():
        before = json.loads(RESULTS.read_text())
        if all(
            before.get(name) == result[name] for name in ("training_cpu_seconds", "tuning_steps", "measured_tokens")
        ):
            result |= {part: before[part] for part in ("bases", "merges", "sharing")}
    known = {(row["base"], row["is_calibrated"]) for row in result["bases"]}
    # A base's row is written after its merges': without it they are made again.
    result["merges"] = [row for row in result["merges"] if (row["base"], row["is_calibrated"]) in known]
    print(json.dumps({name: value for name, value in result.items() if "perplexity" in name}), flush=True)

    def add(part: str, rows: list[dict[str, Any]]) -> None:
        result[part] += rows
        if part != "sharing":
            result[part].sort(key=lambda row: (list(BASES).index(row["base"]), row["is_calibrated"]))
        print(part, json.dumps(rows), flush=True)
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")

    for name, is_calibrated in itertools.product(BASES, (False, True)):
        if (name, is_calibrated) not in known:
            base = quantized(model, name, prose.train if is_calibrated else None)
            about = {"base": name, "is_calibrated": is_calibrated}
            found = compared(base, model, prose.held_out)
            if is_calibrated and name in TUNED:
                adapted = tuned(base, code, options)
                add("merges", [about | row for row in merges(adapted, base, code, BASES[name])])
            add("bases", [about | {"bits_per_weight": bits_per_weight(base)} | found])
    if not result["sharing"]:
        add("sharing", list(sharing(model, prose)))


if __name__ == "__main__":
    main()
