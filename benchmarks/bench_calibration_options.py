"""What each option of calibration adds at equal bits, alone and together: SmolLM2-135M, KL to the float model.

Every row is HQQ in groups of 64 on the same 16k tokens of WikiText-2, and is measured on other WikiText and on a
second text, Python's help topics, that nothing was calibrated or chosen on. ``--every 3`` quantizes each third block
only, and ``--blocks 8`` takes the first blocks of the model for the whole of it: both show differences in a fraction
of the time. Rows are written as they are made.
"""

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _demo_model import demo_model_folder
from _device import describe_device
from bench_calibration import MIXED, N_TOKENS, SECOND_TEXT_WINDOWS, Texts, bits_per_weight, help_text
from bench_quality import KL_WINDOWS, TEXT, WINDOW, evaluate
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import peft_quantlayers as pql

RESULTS = Path(__file__).parent / "results" / "calibration_options.json"
GROUP_SIZE = 64
# That of all rows, so that they can be compared; the default has become 0.5 since.
SHRINKAGE = 0.3
# By width and option, the model that several rows begin with, and the CPU seconds that it took.
KEPT_MODELS: dict[tuple[str, str], tuple[PreTrainedModel, float]] = {}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"asymmetric_targets": False, "initial_codes": "nearest"},
    "asymmetric targets": {"asymmetric_targets": True},
    "error feedback": {"asymmetric_targets": False, "initial_codes": "best"},
    "error feedback by size": {"asymmetric_targets": False, "initial_codes": "act_order"},
    "both": {"asymmetric_targets": True, "initial_codes": "best"},
    "mixed bits": {"asymmetric_targets": False},
    "all three": {"asymmetric_targets": True, "initial_codes": "best"},
    "8-bit metadata in groups of 48": {"asymmetric_targets": True},
    "block finetuning": {"asymmetric_targets": True, "finetune_epochs": 5, "learning_rate": 3e-3},
}
# Rows whose bits are planned: 1 to 4 for each layer, as many bytes as all at one width take.
PLANNED = ("mixed bits", "all three")
WIDTHS = (3, 2)


def tuned_end_to_end(model: PreTrainedModel, float_model: PreTrainedModel, calibration: pql.Calibration) -> Any:
    pql.tune_scales(model, float_model, calibration, epochs=2, learning_rate=TUNING_RATE, progress=False)
    return model


def with_adapter(model: PreTrainedModel, float_model: PreTrainedModel, calibration: pql.Calibration | None) -> Any:
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).eval()
    pql.initialize_loftq(model, float_model, calibration=calibration, progress=False)
    return model


def with_trained_adapter(model: PreTrainedModel, float_model: PreTrainedModel, calibration: pql.Calibration) -> Any:
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).eval()
    options = {"tune_epochs": 2, "learning_rate": TUNING_RATE, "progress": False}
    pql.initialize_loftq(model, float_model, calibration=calibration, **options)
    return model


def with_adapter_of_weights(model: PreTrainedModel, float_model: PreTrainedModel, _: pql.Calibration) -> Any:
    return with_adapter(model, float_model, None)


# Fields of the config. What scales and zeros in 8 bits cost, and what smaller groups for the same bits give.
METADATA: dict[str, dict[str, Any]] = {
    "8-bit metadata in groups of 48": {"double_quant": True, "group_size": 48},
    "without data": {},
    "without data, 8-bit metadata": {"double_quant": True},
    "without data, 8-bit metadata in groups of 48": {"double_quant": True, "group_size": 48},
    "without data, 8-bit metadata in groups of 32": {"double_quant": True, "group_size": 32},
}
# What is done to the model of another row afterwards. An adapter of rank 16 takes 0.74 bits per weight in
# float16 with the shapes of this model, which its rows do not count.
AFTER: dict[str, tuple[str, Callable[[PreTrainedModel, PreTrainedModel, pql.Calibration], Any]]] = {
    "end-to-end tuning": ("asymmetric targets", tuned_end_to_end),
    "adapter of the weights' error": ("asymmetric targets", with_adapter_of_weights),
    "adapter of the outputs' error": ("asymmetric targets", with_adapter),
    "adapter trained against the float model": ("asymmetric targets", with_trained_adapter),
    "without data, adapter of the weights' error": ("without data", with_adapter_of_weights),
    "without data, adapter of the outputs' error": ("without data", with_adapter),
}
TUNING_RATE = 3e-3
RANK = 16
ROWS = [f"{nbits} bits, {name}" for nbits in WIDTHS for name in {**OPTIONS, **METADATA, **AFTER}]


def skipped_blocks(n_blocks: int, every: int) -> list[str]:
    return [f"model.layers.{block}" for block in range(n_blocks) if block % every]


def load(folder: Path, n_blocks: int | None) -> PreTrainedModel:
    """The model, or its first blocks with what follows the last one."""
    sizes = {} if n_blocks is None else {"num_hidden_layers": n_blocks}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **sizes).eval()


def measure(
    name: str,
    folder: Path,
    calibration_ids: Tensor,
    texts: dict[str, Texts],
    every: int,
    n_blocks: int | None,
) -> dict[str, Any]:
    model = load(folder, n_blocks)
    width, _, option = name.partition(" bits, ")
    skipped = skipped_blocks(model.config.num_hidden_layers, every)
    begun, after = AFTER.get(option, (option, None))
    fields = {"group_size": GROUP_SIZE} | METADATA.get(begun, {})
    config = pql.HQQConfig(nbits=int(width), skip_modules=skipped or None, **fields)
    calibration = None
    if begun in OPTIONS:
        calibration = pql.Calibration(data=calibration_ids, n_tokens=N_TOKENS, shrinkage=SHRINKAGE, **OPTIONS[begun])
    began, plan = time.process_time(), None
    if option in PLANNED:
        average = int(width) + 32 / GROUP_SIZE
        plan = pql.plan_bits(
            model, calibration, average=average, choices=MIXED[int(width)], config=config, progress=False
        )
    if after is not None and (kept := KEPT_MODELS.get((width, begun))) is not None:
        model, seconds = copy.deepcopy(kept[0]), kept[1]
        began -= seconds
    else:
        pql.quantize_model(model, config, calibration=calibration, budget=plan, progress=False)
        if after is not None:
            KEPT_MODELS[width, begun] = copy.deepcopy(model), time.process_time() - began
    bits = bits_per_weight(model)
    if after is not None:
        given = pql.Calibration(data=calibration_ids, n_tokens=N_TOKENS, shrinkage=SHRINKAGE, batch_size=1)
        model = after(model, load(folder, n_blocks), given)
    row: dict[str, Any] = {
        "name": name,
        "every": every,
        "blocks": model.config.num_hidden_layers,
        "bits_per_weight": bits,
        "cpu_s": time.process_time() - began,
        "predicted_kl": None if plan is None else plan.predicted_kl,
        "measured_kl_on_calibration_text": None if plan is None else plan.measured_kl,
    }
    for text, (windows, kept) in texts.items():
        perplexity, row[f"kl_{text}"] = evaluate(model, windows, kept)
        # The perplexity of the first blocks alone says nothing.
        row[f"perplexity_{text}"] = None if n_blocks is not None else perplexity
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="quantize one block of so many")
    parser.add_argument("--blocks", type=int, help="of the model, from the first")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="names of rows to make, or parts of names")
    args = parser.parse_args()

    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wikitext = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0]
    float_model = load(folder, args.blocks)
    texts: dict[str, Texts] = {}
    for text, ids, n_windows in (
        ("wikitext", wikitext, KL_WINDOWS),
        ("help", help_text(tokenizer), SECOND_TEXT_WINDOWS),
    ):
        windows, kept = ids[: n_windows * WINDOW].view(n_windows, WINDOW), []
        evaluate(float_model, windows, kept)
        texts[text] = (windows, kept)
    del float_model

    known = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    rows = {(row["name"], row["every"], row["blocks"]): row for row in known}
    for name in [
        name for name in ROWS if any(part == name or (part not in ROWS and part in name) for part in args.rows)
    ]:
        row = measure(name, folder, wikitext[len(wikitext) // 2 :], texts, args.every, args.blocks)
        print(json.dumps(row), flush=True)
        rows[name, args.every, row["blocks"]] = row
        result = {
            "device": describe_device(),
            "model": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
            "calibration_tokens": N_TOKENS,
            "group_size": GROUP_SIZE,
            "rows": sorted(rows.values(), key=lambda row: (-row["blocks"], row["every"], ROWS.index(row["name"]))),
        }
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
