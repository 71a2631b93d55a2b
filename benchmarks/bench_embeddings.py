"""What quantized embeddings and a quantized output head cost and save: SmolLM2-135M on WikiText-2, HQQ at 4 bits.

The model ties its head to its embeddings: dense, they are 21 % of its weights, and with all other weights at 4 bits
half of its bytes. KL is the mean divergence of the next-token distribution from the same model with dense embeddings,
and from the float model. Times are of one token through the whole model in float32, the three taking turns; the files
are those of the model in bfloat16.

The model was read from a file of 4-bit blocks (GGUF Q4_1, groups of 32), embeddings included; a group of 64 contains
two of their grids, unlike the rows of other models.
"""

import argparse
import json
import random
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from _cpu import Clock, add_options, begin, kernels_in_use
from _demo_model import demo_model_folder
from _device import describe_device
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.evaluate import divergence, perplexity

TEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"
RESULTS = Path(__file__).parent / "results" / "embeddings.json"
WINDOW = 512
BITS = (None, 8, 4)


def quantized(bits: int | None) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=torch.float32).eval()
    return pql.quantize_model(model, pql.HQQConfig(nbits=4, quantize_embeddings=bits), progress=False)


@torch.no_grad()
def seconds_per_token(models: dict[int | None, nn.Module], repeats: int, clock: Clock) -> dict[int | None, float]:
    """Median seconds of one token, and of the head alone, of each model; they take turns."""
    token, seconds = torch.tensor([[1]]), {bits: [] for bits in models}
    for repeat in range(repeats + 1):
        for bits in random.sample(list(models), len(models)):
            start = clock()
            models[bits](input_ids=token, use_cache=False)
            if repeat:
                seconds[bits].append(clock() - start)
    return {bits: statistics.median(times) for bits, times in seconds.items()}


def sizes(model: nn.Module) -> tuple[int, int]:
    """Bytes of the parameters, and of the file, of ``model`` in bfloat16; it is changed."""
    model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        pql.save_model(model, Path(folder) / "saved")
        file = sum(each.stat().st_size for each in (Path(folder) / "saved").glob("*.safetensors"))
    return pql.summary(model).nbytes, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to score")
    parser.add_argument("--repeats", type=int, default=60)
    add_options(parser)
    args = parser.parse_args()
    clock, clock_name = begin(args)
    folder = demo_model_folder()
    ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt").input_ids[0]
    ids = ids[: args.windows * WINDOW]
    options = {"window": WINDOW, "progress": False}
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    models = {bits: quantized(bits) for bits in BITS}
    seconds = seconds_per_token(models, args.repeats, clock)
    rows = []
    for bits, model in models.items():
        row = {
            "bits": bits,
            "perplexity": perplexity(model, ids, window=WINDOW),
            "kl_to_float": divergence(model, float_model, ids, **options).kl,
            "kl_to_dense_embeddings": 0.0 if bits is None else divergence(model, models[None], ids, **options).kl,
            "seconds_per_token": seconds[bits],
            "rate_vs_dense_embeddings": seconds[None] / seconds[bits],
        }
        rows.append(row)
        print(row, flush=True)
    for row, model in zip(rows, models.values(), strict=True):
        row["memory_bytes"], row["file_bytes"] = sizes(model)
        print(row["bits"], row["memory_bytes"], row["file_bytes"], flush=True)
    measured = {
        "device": describe_device() | {"kernels": kernels_in_use()},
        "command": shlex.join(["python", "benchmarks/bench_embeddings.py", *sys.argv[1:]]),
        "model": "SmolLM2-135M-Instruct",
        "clock": clock_name,
        "windows": args.windows,
        "window_tokens": WINDOW,
        "float_perplexity": perplexity(float_model, ids, window=WINDOW),
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
