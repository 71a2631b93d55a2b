"""The gain of LoftQ before any training: SmolLM2-135M on WikiText-2, HQQ without data, an adapter of rank 16.

KL is the mean divergence of the next-token distribution from the float model's; ``iterations`` as in
:func:`peft_quantlayers.initialize_loftq`, 0 for an adapter that is initialised to zero.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _demo_model import demo_model_folder
from _device import describe_device
from bench_quality import TEXT, WINDOW, evaluate
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql

RESULTS = Path(__file__).parent / "results" / "loftq.json"
SETTINGS = ((4, 64), (3, 64), (2, 16))
ITERATIONS = (0, 1, 5)
RANK = 16


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model. ``seconds``: of the initialisation alone."""

    nbits: int
    group_size: int
    iterations: int
    perplexity: float
    kl_to_float: float
    seconds: float


def measure(nbits: int, group_size: int, iterations: int, windows: Tensor, kept: list[Tensor]) -> Row:
    folder = demo_model_folder()
    config = pql.HQQConfig(nbits=nbits, group_size=group_size)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear")).eval()
    start = time.perf_counter()
    if iterations:
        pql.initialize_loftq(model, folder, iterations=iterations, progress=False)
    seconds = time.perf_counter() - start
    perplexity, kl = evaluate(model, windows, kept)
    return Row(
        nbits=nbits,
        group_size=group_size,
        iterations=iterations,
        perplexity=perplexity,
        kl_to_float=kl,
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to score")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()

    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(TEXT.read_text(), return_tensors="pt", verbose=False).input_ids[0]
    windows = token_ids[: options.windows * WINDOW].view(options.windows, WINDOW)
    kept: list[Tensor] = []
    float_perplexity, _ = evaluate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), windows, kept)
    rows = []
    for nbits, group_size in SETTINGS:
        for iterations in ITERATIONS:
            row = measure(nbits, group_size, iterations, windows, kept)
            rows.append(asdict(row))
            print(
                f"{nbits}-bit g{group_size}  {iterations} iterations  perplexity {row.perplexity:10.2f}  "
                f"KL {row.kl_to_float:.4f}  in {row.seconds:.1f} s",
                flush=True,
            )
    result = {
        "device": describe_device(),
        "model": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
        "windows": options.windows,
        "window_tokens": WINDOW,
        "rank": RANK,
        "float_perplexity": float_perplexity,
        "rows": rows,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
