"""Seconds for one LoRA training step on SmolLM2-135M: quantized base against the dense float32 base, interleaved.

A step is forward, backward and AdamW; LoRA of rank 8 on all linear layers, or scale-only finetuning of them. Before
anything is timed, loss and gradients of the quantized models are compared with those of their own dequantized copies,
and a wrong one is refused.
"""

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _device import describe_device
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.evaluate import demo_model_folder, saved_for_backward

RESULTS = Path(__file__).parent / "results" / "lora_step.json"


# The layer whose kept bytes are counted.
OUT_FEATURES, IN_FEATURES, SAVED_TOKENS, SAVED_RANK = 1536, 576, 512, 16

# Codes as they come: a step takes the same time with better ones.
AQLM = pql.AQLMConfig(rounds=0, beam=1)


def adapted_model(dtype: torch.dtype, config: pql.QuantConfig | None, adapter: PeftConfig | None = None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=dtype, quantization_config=config)
    torch.manual_seed(0)
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter or lora).train()


def refuse_wrong_gradients(model: nn.Module, ids: torch.Tensor) -> None:
    """Compare loss and adapter gradients with those over plain dense layers that hold the dequantized weights."""
    dense = pql.dequantize_model(copy.deepcopy(model))
    grads = []
    for candidate in (model, dense):
        loss = candidate(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append([loss.detach(), *[p.grad for p in candidate.parameters() if p.grad is not None]])
        candidate.zero_grad()
    for ours, reference in zip(*grads, strict=True):
        error = (ours - reference).float().norm() / reference.float().norm()
        if not error < 1e-3:
            raise SystemExit(f"a gradient of the quantized model is off by {error:.2e}: nothing was timed.")


def seconds_per_step(
    models: dict[str, nn.Module], ids: torch.Tensor, repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    optimizers = {
        name: torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)
        for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            start = clock()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat:  # the first round warms up
                seconds[name].append(clock() - start)
    return seconds


def saved_bytes(layer: nn.Module, dtype: torch.dtype, dropout: float) -> int:
    """What one layer with LoRA of rank 16 on it keeps of ``SAVED_TOKENS`` tokens for the backward pass."""
    model = nn.ModuleDict({"layer": layer})
    model = get_peft_model(model, LoraConfig(r=SAVED_RANK, lora_dropout=dropout, target_modules=["layer"]))
    return saved_for_backward(
        model.base_model.model["layer"], torch.randn(SAVED_TOKENS, IN_FEATURES, dtype=dtype, requires_grad=True)
    )


def quantized(layer: nn.Module, config: pql.QuantConfig) -> nn.Module:
    return pql.quantize_model(nn.Sequential(copy.deepcopy(layer)), config, progress=False)[0]


def saved_rows() -> list[dict[str, object]]:
    """Bytes kept for the backward pass: ours, PEFT's on a plain linear, and PEFT's on the ``hqq`` package's layer."""
    rows: list[dict[str, object]] = []
    for dtype, dropout in ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)):
        floor = SAVED_TOKENS * (IN_FEATURES * dtype.itemsize + SAVED_RANK * 4 + (IN_FEATURES if dropout else 0))
        dense = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False).to(dtype)
        settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        layers = {
            "HQQ 4-bit": quantized(dense, pql.HQQConfig(nbits=4)),
            "AQLM 2x8": quantized(dense, AQLM),
            "PEFT on a dense layer": copy.deepcopy(dense),
            "PEFT on the hqq package": HQQLinear(copy.deepcopy(dense), settings, compute_dtype=dtype, device="cpu"),
        }
        for name, layer in layers.items():
            if name.endswith("hqq package"):
                pql.unregister()
            saved = saved_bytes(layer, dtype, dropout)
            pql.register()
            rows.append({"layer": name, "dtype": str(dtype)[6:], "dropout": dropout, "bytes": saved, "floor": floor})
            print(f"{name:24} {dtype}, dropout {dropout}: {saved / floor:.2f} x the floor of {floor} bytes kept")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--one-thread", action="store_true", help="one thread, and its CPU time: on a shared machine")
    args = parser.parse_args()
    if args.one_thread:
        torch.set_num_threads(1)
    saved = saved_rows()

    models = {
        "dense float32": adapted_model(torch.float32, None),
        "HQQ 4-bit, float32": adapted_model(torch.float32, pql.HQQConfig(nbits=4)),
        "HQQ 2-bit, float32": adapted_model(torch.float32, pql.HQQConfig(nbits=2)),
        "AQLM 2x8, float32": adapted_model(torch.float32, AQLM),
        "HQQ 4-bit, scales only": adapted_model(torch.float32, pql.HQQConfig(nbits=4), pql.QuantScalesConfig()),
        "AQLM 2x8, scales only": adapted_model(torch.float32, AQLM, pql.QuantScalesConfig()),
        "dense bfloat16": adapted_model(torch.bfloat16, None),
        "HQQ 4-bit, bfloat16": adapted_model(torch.bfloat16, pql.HQQConfig(nbits=4)),
    }
    torch.manual_seed(0)
    vocabulary = next(iter(models.values())).config.vocab_size
    for name in ("HQQ 4-bit, float32", "AQLM 2x8, float32"):
        refuse_wrong_gradients(models[name], torch.randint(0, vocabulary, (1, 32)))

    rows = []
    for tokens in args.tokens:
        ids = torch.randint(0, vocabulary, (args.batch, tokens))
        clock = time.process_time if args.one_thread else time.perf_counter
        seconds = seconds_per_step(models, ids, args.repeats, clock)
        dense = statistics.median(seconds["dense float32"])
        for name, times in seconds.items():
            median = statistics.median(times)
            rows.append(
                {
                    "model": name,
                    "batch": args.batch,
                    "tokens": tokens,
                    "median_s": median,
                    "min_s": min(times),
                    "max_s": max(times),
                    "rate_vs_dense_float32": dense / median,
                }
            )
            print(
                f"{args.batch} x {tokens:4} tokens  {name:20}  {median:6.3f} s  "
                f"({min(times):.3f} to {max(times):.3f})  {dense / median:5.2f} x the dense float32 rate",
                flush=True,
            )
    clock_name = "CPU time" if args.one_thread else "wall clock"
    result = {"device": describe_device(), "clock": clock_name, "rows": rows, "saved": saved}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
