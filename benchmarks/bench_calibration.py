"""The gain of calibration and tuning at 4 bits and fewer: SmolLM2-135M, perplexity and KL on two texts.

Calibration and training read the second half of WikiText-2, the measurement its first windows; scored as in
``bench_quality.py``. The second text, Python's help topics, is of another kind: nothing was calibrated on it.
Every row is written when it is done, so that rows can be made in several runs (``--rows``), also at the same time.

A row is "base" or "base + tuning"; bases are quantized with 16k calibration tokens unless they say otherwise. Tuning
towards the float model's predictions (``tune_scales``) reads four times as many tokens of the base's kind, any other
is plain next-token training on the calibration half. "Mixed bits" are planned, with as many bytes as all layers
at one width take. The best rows spend those bytes on groups of 48 with scales and zeros in 8 bits, mixed bits, and
codes that begin with error feedback where that is better.
"""

import argparse
import json
import pydoc_data.topics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from _demo_model import demo_model_folder
from _device import describe_device
from bench_quality import KL_WINDOWS, TEXT, WINDOW, evaluate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from quantlayers_kernels.cache_folder import cache_folder

RESULTS = Path(__file__).parent / "results" / "calibration.json"
N_TOKENS = 16_384
SECOND_TEXT_WINDOWS = 4
# Windows to score, and the float model's log-probabilities there.
Texts = tuple[Tensor, list[Tensor]]
FINETUNE = {"finetune_epochs": 3, "learning_rate": 3e-3}
TUNING_STEPS, BATCH, LENGTH = 60, 4, 128

HQQ = {
    "4 bits, group 64": (4, 64),
    "3 bits, group 64": (3, 64),
    "2 bits, group 64": (2, 64),
    "2 bits, group 16": (2, 16),
}
WHOLE_ZEROS = {
    f"HQQ 4 bits, group 64, {kind} zeros": pql.HQQConfig(nbits=4, group_size=64, **field)
    for kind, field in {"integer": {"integer_zero": True}, "symmetric": {"symmetric": True}}.items()
}
# Widths to choose from, by their average, and what the best rows choose from: stored bits per weight, and fields.
MIXED = {3: [2, 3, 4], 2: [1, 2, 3]}
SMALL_GROUPS: dict[str, Any] = {"double_quant": True, "group_size": 48}
BEST: dict[float, list[dict[str, Any]]] = {
    4.5: [*({"nbits": n} | SMALL_GROUPS for n in (3, 4)), {"nbits": 5, "double_quant": False, "group_size": 64}],
    3.5: [{"nbits": n} | SMALL_GROUPS for n in (2, 3, 4)],
    2.5: [{"nbits": n} | SMALL_GROUPS for n in (1, 2, 3)],
}
# Stored bits per weight of AQLM layers whose number of codebooks is planned; the first are those of 2x8.
CODEBOOKS_BUDGETS = (2.153, 2.5)
SYMMETRIC_TARGETS, SYMMETRIC_SAID = {"asymmetric_targets": False}, "without asymmetric targets"
# In the name of a base: how many times as many tokens, half of them the model's own.
SAMPLED_SAID, MORE_SAID = "half of it on the model's own text", "twice as many tokens, half of them its own text"
SAMPLED = {SAMPLED_SAID: 1, MORE_SAID: 2}
BASES: dict[str, tuple[pql.QuantConfig, dict[str, Any] | None]] = {
    **{f"HQQ {name}": (pql.HQQConfig(nbits=n, group_size=g), None) for name, (n, g) in HQQ.items()},
    **{f"HQQ {name}, calibrated": (pql.HQQConfig(nbits=n, group_size=g), {}) for name, (n, g) in HQQ.items()},
    **{
        f"HQQ {name}, calibrated, {SYMMETRIC_SAID}": (pql.HQQConfig(nbits=n, group_size=g), SYMMETRIC_TARGETS)
        for name, (n, g) in HQQ.items()
    },
    **{name: (config, None) for name, config in WHOLE_ZEROS.items()},
    **{f"{name}, calibrated": (config, {}) for name, config in WHOLE_ZEROS.items()},
    "HQQ 2 bits, group 64, calibrated, finetuned": (pql.HQQConfig(nbits=2, group_size=64), FINETUNE),
    **{
        f"HQQ mixed bits, {n} on average, group 64, calibrated{said}": (pql.HQQConfig(nbits=n, group_size=64), options)
        for n, said, options in ((3, "", {}), (2, "", {}), (2, ", finetuned", FINETUNE))
    },
    **{
        f"HQQ best at {bits} bits per weight, calibrated{said}": (
            pql.HQQConfig(nbits=int(bits), **SMALL_GROUPS),
            {"initial_codes": "best"},
        )
        for said in ("", *(f", {each}" for each in SAMPLED))
        for bits in BEST
    },
    **{
        f"HQQ {name}, calibrated, {said}": (pql.HQQConfig(nbits=n, group_size=g), {})
        for name, (n, g) in HQQ.items()
        for said in SAMPLED
    },
    f"HQQ best at 2.5 bits per weight, calibrated, finetuned, {SAMPLED_SAID}": (
        pql.HQQConfig(nbits=2, **SMALL_GROUPS),
        {"initial_codes": "best"} | FINETUNE,
    ),
    f"AQLM 2x8, calibrated, {SAMPLED_SAID}": (pql.AQLMConfig(), {}),
    f"AQLM 2x8, calibrated, finetuned, {SAMPLED_SAID}": (pql.AQLMConfig(), FINETUNE),
    **{
        f"AQLM 1x8 to 3x8 at {bits} bits per weight, calibrated, {SAMPLED_SAID}": (pql.AQLMConfig(), {})
        for bits in CODEBOOKS_BUDGETS
    },
    "AQLM 2x8": (pql.AQLMConfig(), None),
    "AQLM 2x8, calibrated": (pql.AQLMConfig(), {}),
    "AQLM 2x8, calibrated, finetuned": (pql.AQLMConfig(), FINETUNE),
    **{
        f"AQLM 2x8, {way}, {SYMMETRIC_SAID}": (pql.AQLMConfig(), options | SYMMETRIC_TARGETS)
        for way, options in (("calibrated", {}), ("calibrated, finetuned", FINETUNE))
    },
}
# Rows whose bits are planned: stored bits per weight, and what each layer may take.
PLANNED: dict[str, tuple[float, list[Any]]] = {
    name: (config.nbits + 32 / config.group_size, MIXED[config.nbits])
    for name, (config, _) in BASES.items()
    if "mixed" in name
}
for bits, choices in BEST.items():
    PLANNED |= {name: (bits, choices) for name in BASES if f"HQQ best at {bits} bits" in name}
for bits in CODEBOOKS_BUDGETS:
    PLANNED |= {name: (bits, [1, 2, 3]) for name in BASES if f"3x8 at {bits} bits" in name}
TUNINGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "scales": lambda: pql.QuantScalesConfig(train=("scales",)),
    "scales, codebooks, norms": lambda: pql.QuantScalesConfig(train=("scales", "codebooks", "norms")),
    "LoRA r8": lambda: peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
}
LEARNING_RATES = {"scales": 1e-3, "scales, codebooks, norms": 1e-3, "LoRA r8": 5e-4}
TOWARDS_FLOAT = "predictions of the float model"
TUNED_TOWARDS_FLOAT = [
    f"HQQ best at 2.5 bits per weight, calibrated, {SAMPLED_SAID}",
    f"AQLM 2x8, calibrated, {SAMPLED_SAID}",
    f"AQLM 2x8, calibrated, finetuned, {SAMPLED_SAID}",
]
ROWS = [
    *BASES,
    *(f"{base} + {TOWARDS_FLOAT}" for base in TUNED_TOWARDS_FLOAT),
    *(f"AQLM 2x8, calibrated, {SYMMETRIC_SAID} + {tuning}" for tuning in TUNINGS),
]


def tune(model: nn.Module, text: Tensor, tuning: str) -> float:
    """Train in place for a fixed number of steps; seconds a step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATES[tuning], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATES[tuning], total_steps=TUNING_STEPS)
    windows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    model.train()
    began = time.perf_counter()
    for step in range(TUNING_STEPS):
        ids = windows[order[step * BATCH : (step + 1) * BATCH]]
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()
    return (time.perf_counter() - began) / TUNING_STEPS


def help_text(tokenizer: Any) -> Tensor:
    """Token ids of Python's help topics, whose text no benchmark calibrates on."""
    topics = "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))
    return tokenizer(topics, return_tensors="pt").input_ids[0]


def sampled_tokens(model: nn.Module, tokenizer: Any, cache: Path, *, n_tokens: int) -> Tensor:
    """(n, 512): ``n_tokens`` that ``model`` writes itself, kept in ``cache``."""
    file = cache / f"sampled_{n_tokens}.safetensors"
    if not file.exists():
        began = time.process_time()
        ids = pql.sample_calibration_data(model, tokenizer, n_tokens=n_tokens, sequence_length=WINDOW)
        cache.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids.contiguous()}, file)
        print(f"{ids.numel():,} tokens sampled in {time.process_time() - began:.0f} CPU seconds", flush=True)
    return load_file(file)["ids"]


def half_sampled(model: nn.Module, folder: Path, text: Tensor, cache: Path, *, n_tokens: int) -> Tensor:
    """(n, 512): ``n_tokens``, half of them of ``text`` and half written by ``model``."""
    own = sampled_tokens(model, AutoTokenizer.from_pretrained(folder), cache, n_tokens=n_tokens // 2)
    given = pql.Calibration(data=text, n_tokens=own.numel(), sequence_length=WINDOW)
    return torch.cat([*given.batches(model), own])


def measure(name: str, folder: Path, text: Tensor, texts: dict[str, Texts], cache: Path) -> dict[str, Any]:
    base, _, tuning = name.partition(" + ")
    config, options = BASES[base]
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration, n_tokens, data = None, N_TOKENS, text
    if times := next((times for said, times in SAMPLED.items() if said in base), None):
        n_tokens *= times
        data = half_sampled(float_model, folder, text, cache, n_tokens=n_tokens)
    if options is not None:
        calibration = pql.Calibration(
            data=data, n_tokens=n_tokens, resume_folder=cache / base.replace(" ", "-"), **options
        )
    row: dict[str, Any] = {
        "name": name,
        "quantize_s": None,
        "shrinkage": None if calibration is None else calibration.used_shrinkage,
        "threads": torch.get_num_threads(),
        "cpu": describe_device()["cpu"],
        "tuning_s_per_step": None,
    }
    predictions = None
    if tuning == TOWARDS_FLOAT:
        more = half_sampled(float_model, folder, text, cache, n_tokens=4 * n_tokens)
        predictions = pql.record_predictions(float_model, more, progress=False)
    kept = cache / "models" / base.replace(" ", "-")  # a tuning starts from the base that has a row
    if tuning and kept.exists():
        model = AutoModelForCausalLM.from_pretrained(kept).eval()
    else:
        model = float_model
        began, cpu_began = time.perf_counter(), time.process_time()
        plan = None
        if base in PLANNED:
            average, choices = PLANNED[base]
            plan = pql.plan_bits(model, calibration, average=average, choices=choices, config=config, progress=False)
        pql.quantize_model(model, config, calibration=calibration, budget=plan, progress=False)
        if not tuning:  # of which a base's row has the time
            row |= {"quantize_s": time.perf_counter() - began, "quantize_cpu_s": time.process_time() - cpu_began}
        pql.save_model(model, kept)
    if predictions is not None:
        began = time.process_time()
        result = pql.tune_scales(model, predictions, resume_folder=cache / "tuning", progress=False)
        row |= {"tuning_cpu_s": time.process_time() - began, "is_kept": result.is_kept}
    elif tuning:
        tuned = peft.get_peft_model(model, TUNINGS[tuning]())
        row["tuning_s_per_step"] = tune(tuned, text, tuning)
        return row | scores(tuned, texts) | {"bits_per_weight": tuned_bits_per_weight(tuned)}
    return row | scores(model, texts) | {"bits_per_weight": bits_per_weight(model)}


def scores(model: nn.Module, texts: dict[str, Texts]) -> dict[str, float]:
    """Perplexity and KL on each text."""
    found = {}
    for ending, (windows, kept) in texts.items():
        found[f"perplexity{ending}"], found[f"kl_to_float{ending}"] = evaluate(model, windows, kept)
    return found


def bits_per_weight(model: nn.Module, extra_bits: int = 0) -> float:
    """Of all quantized layers, with ``extra_bits`` in addition."""
    layers = pql.quantized_modules(model).values()
    weights = [layer.in_features * layer.out_features for layer in layers]
    bits = [layer.quantized_weight.bits_per_weight for layer in layers]
    return (sum(b * w for b, w in zip(bits, weights, strict=True)) + extra_bits) / sum(weights)


def tuned_bits_per_weight(tuned: peft.PeftModel) -> float:
    """Tuned scales are merged, which widens them; LoRA stays unmerged, as it is saved."""
    if isinstance(tuned.active_peft_config, pql.QuantScalesConfig):
        return bits_per_weight(tuned.merge_and_unload())
    return bits_per_weight(tuned, 8 * sum(p.nbytes for name, p in tuned.named_parameters() if "lora_" in name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to score")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="names of rows to make, or parts of names")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "bench_calibration")
    args = parser.parse_args()

    folder = demo_model_folder()
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids, second = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0], help_text(tokenizer)
    texts: dict[str, Texts] = {
        "": (ids[: args.windows * WINDOW].view(args.windows, WINDOW), []),
        "_second_text": (second[: SECOND_TEXT_WINDOWS * WINDOW].view(SECOND_TEXT_WINDOWS, WINDOW), []),
    }
    of_float = scores(float_model, texts)  # which fills the lists
    for name in [
        name for name in ROWS if any(part == name or (part not in ROWS and part in name) for part in args.rows)
    ]:
        row = measure(name, folder, ids[len(ids) // 2 :], texts, args.cache)
        print(json.dumps(row), flush=True)
        known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        rows = {row["name"]: row for row in known} | {name: row}
        result = {
            "device": describe_device(),
            "model": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
            "calibration_tokens": N_TOKENS,
            "shrinkage": pql.Calibration(data=ids).used_shrinkage,
            "tuning": {"steps": TUNING_STEPS, "batch": BATCH, "tokens": LENGTH},
            "windows": args.windows,
            "window_tokens": WINDOW,
            "kl_windows": min(KL_WINDOWS, args.windows),
            "second_text_windows": SECOND_TEXT_WINDOWS,
            "float_perplexity": of_float["perplexity"],
            "float_perplexity_second_text": of_float["perplexity_second_text"],
            "rows": [rows[known] for known in ROWS if known in rows],
        }
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
