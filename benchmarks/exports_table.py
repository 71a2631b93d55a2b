"""Exports to every format, read by the engines' own readers and compared with the quantized model.

Writes ``benchmarks/results/exports.json``, from which ``tables.py`` makes the table of ``docs/exports.md``. Models:
SmolLM2-135M on the first tokens of WikiText-2's test part, and tiny random ones of other architectures on random
tokens. Makes the rows that the file does not have; all of them with ``--again``; or those of the patterns.

    python benchmarks/exports_table.py ['SmolLM2 gguf*']   [--readers PYTHON]   [--vllm PYTHON]   [--merged FOLDER]

FOLDER is the model that the demo has tuned and merged: ``make demo-table ARGS="--output FOLDER"`` saves it in
FOLDER/merged.
vLLM for CPUs wants an older transformers, so that it has an environment of its own.
"""

import argparse
import fnmatch
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _demo_model import demo_model_folder, ensure_converter
from _device import describe_device
from _tiny_decoders import tiny_decoder
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql

RESULT = Path(__file__).parent / "results" / "exports.json"
WIKITEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"
TOKENS = {"SmolLM2": 64, "tiny": 24}
# With the vocabulary of SmolLM2, whose tokenizer llama.cpp knows.
SIZES = {"intermediate_size": 128, "num_hidden_layers": 6, "vocab_size": 49152}
TINY = {
    "Llama": "llama", "Mistral": "mistral", "Qwen3": "qwen3", "Gemma 3": "gemma3", "Phi-3": "phi3", "GPT-2": "gpt2",
    "Qwen3-MoE": "qwen3-moe",
}  # fmt: skip
ZEROS = {"integer_zero": "integer", "symmetric": "symmetric"}
MERGED = "SmolLM2, tuned and merged"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: a model on a grid, a format and a reader; ``reader`` None where none runs on a CPU."""

    model: str
    format: str
    reader: str | None
    nbits: int = 4
    group_size: int = 64
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    has_adapter: bool = False

    @property
    def name(self) -> str:
        said = [f"{name}={value}" for name, value in self.fields.items()]
        said += [str(value) for value in self.options.values()]
        said += ["with an adapter"] if self.has_adapter else []
        return " ".join([self.model, self.format, f"{self.nbits}/{self.group_size}", *said, self.reader or "-"])


def cases() -> list[Case]:
    whole, symmetric = {"fields": {"integer_zero": True}}, {"fields": {"symmetric": True}}
    # Rows of one quantized model follow each other.
    found = [
        Case(model="SmolLM2", format="gguf", reader="llama.cpp"),
        Case(model="SmolLM2", format="mlx", reader="mlx"),
        Case(model="SmolLM2", format="humming", reader=None),
        Case(model="SmolLM2", format="hqq", reader=None),
        *(
            Case(
                model="SmolLM2", format="compressed-tensors", reader="compressed-tensors", options={"approximate": way}
            )
            for way in ("8bit", "adapter", "requantize")
        ),
        Case(model="SmolLM2", format="dense", reader="transformers"),
        Case(model="SmolLM2", format="compressed-tensors", reader="compressed-tensors", **whole),
    ]
    for family in TINY:
        for name, reader in (("gguf", "llama.cpp"), ("mlx", "mlx"), ("onnx", "onnx"), ("openvino", "openvino")):
            found.append(Case(model=family, format=name, reader=reader, group_size=32))
        zeros = symmetric if "MoE" in family else whole
        found.append(
            Case(model=family, format="compressed-tensors", reader="compressed-tensors", group_size=32, **zeros)
        )
    found += [
        Case(model="Qwen3-MoE", format="humming", reader=None, group_size=32),
        Case(model="SmolLM2", format="compressed-tensors", reader="compressed-tensors", **symmetric),
        *(Case(model="SmolLM2", format=name, reader=None, **whole) for name in ("awq", "gptq")),
        *(Case(model="SmolLM2", format=name, reader=name) for name in ("onnx", "openvino")),
        Case(model="SmolLM2", format="openvino", reader="openvino", options={"dtype": torch.float16}),
        Case(model="SmolLM2", format="compressed-tensors", reader="vllm", **whole),
        Case(model="SmolLM2", format="compressed-tensors", reader="vllm", has_adapter=True, **whole),
        Case(model="SmolLM2", format="compressed-tensors", reader="vllm", options={"approximate": "adapter"}),
        *(Case(model="SmolLM2", format="mlx", reader="mlx", nbits=nbits) for nbits in (3, 8)),
        *(Case(model="SmolLM2", format="gguf", reader="llama.cpp", nbits=nbits) for nbits in (3, 5, 8)),
        Case(model="SmolLM2", format="gguf", reader="llama.cpp", group_size=32),
        *(
            Case(model=MERGED, format=name, reader=reader)
            for name, reader in (("gguf", "llama.cpp"), ("mlx", "mlx"), ("onnx", "onnx"), ("openvino", "openvino"))
        ),
        *(
            Case(model=MERGED, format="compressed-tensors", reader=reader, options={"approximate": "adapter"})
            for reader in ("compressed-tensors", "vllm")
        ),
    ]
    return found


class Models:
    """The quantized models, one at a time, with their tokens and logits."""

    def __init__(self, merged: Path | None) -> None:
        self._merged = merged
        self._key: Any = None
        self._made: tuple[Any, torch.Tensor, torch.Tensor] | None = None
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())

    def quantized(self, case: Case) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Model, token ids and its logits."""
        key = (case.model, case.nbits, case.group_size, tuple(case.fields))
        if key != self._key or self._made is None:
            self._key, self._made = key, self._make(case)
        return self._made

    def _make(self, case: Case) -> tuple[Any, torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        if case.model in ("SmolLM2", MERGED):
            folder = demo_model_folder() if case.model == "SmolLM2" else self._merged
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            text = WIKITEXT.read_text(encoding="utf-8")[:4000]
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)[: TOKENS["SmolLM2"]]
        else:
            model = tiny_decoder(TINY[case.model], **SIZES)
            ids = torch.randint(3, 4000, (TOKENS["tiny"],), generator=torch.Generator().manual_seed(0))
        if case.model != MERGED:
            config = pql.HQQConfig(nbits=case.nbits, group_size=case.group_size, **case.fields)
            pql.quantize_model(model, config, progress=False)
        with torch.no_grad():
            return model, ids, model(ids[None]).logits[0].float()


def row(case: Case, models: Models, readers: dict[str, str], folder: Path) -> dict[str, Any]:
    model, ids, expected = models.quantized(case)
    options = dict(case.options)
    if case.has_adapter:
        options["adapter"], expected = some_adapter(model, ids, folder / "adapter")
    result: dict[str, Any] = {
        "model": case.model, "format": case.format, "nbits": case.nbits, "group_size": case.group_size,
        "zeros": next((kind for field, kind in ZEROS.items() if case.fields.get(field)), "float"),
        "options": {name: str(value).removeprefix("torch.") for name, value in case.options.items()},
        "has_adapter": case.has_adapter,
    }  # fmt: skip
    out = folder / "MODEL"
    tokenizer = tokenizer_for(case, models, folder)
    try:
        report = pql.export(model, out, case.format, tokenizer=tokenizer, **options)
    except (ValueError, NotImplementedError) as error:
        return result | {"refused": words_of(error)}
    patterns = ("*.safetensors", "*.gguf", "*.onnx", "*.onnx.data", "openvino_model.bin", "adapter/*.safetensors")
    weights = [file for pattern in patterns for file in out.glob(pattern)]
    result |= {
        "relative_error": report.relative_error,
        "is_exact": report.is_exact,
        "bits": report.bits[1],
        "mb": sum(file.stat().st_size for file in weights) / 1e6,
        "command": report.serving_command.replace(str(out), "MODEL"),
    }
    return result if case.reader is None else result | read(case, out, ids, expected, readers, folder)


def words_of(error: Exception) -> str:
    """The first sentence of a refusal, or the last line of a converter's own words."""
    ours, _, theirs = str(error).partition(" It says:\n")
    if theirs:
        return f"{ours.partition(';')[0]}: {theirs.splitlines()[-1].strip()}"
    return ours.replace("\n  ", " ").split(". ")[0]


def some_adapter(model: Any, ids: torch.Tensor, folder: Path) -> tuple[Path, torch.Tensor]:
    """A random LoRA of rank 8 of PEFT in ``folder``, and the logits of the model with it."""
    tuned = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.01)
    tuned.save_pretrained(folder)
    with torch.no_grad():
        logits = tuned.eval()(ids[None]).logits[0].float()
    tuned.unload()
    return folder, logits


def tokenizer_for(case: Case, models: Models, folder: Path) -> Any:
    """SmolLM2's; a sentencepiece one where llama.cpp's converter takes no other."""
    if case.format == "gguf" and case.model == "Phi-3":
        import sentencepiece

        (folder / "sentencepiece").mkdir()
        text = folder / "text.txt"
        text.write_text(WIKITEXT.read_text(encoding="utf-8")[:200_000])
        sentencepiece.SentencePieceTrainer.Train(
            input=str(text), model_prefix=str(folder / "sentencepiece" / "tokenizer"), vocab_size=1000,
            model_type="bpe", byte_fallback=True, minloglevel=2,
        )  # fmt: skip
        (folder / "sentencepiece" / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
        return folder / "sentencepiece"
    return models.tokenizer


def read(
    case: Case, out: Path, ids: torch.Tensor, expected: torch.Tensor, readers: dict[str, str], folder: Path
) -> dict[str, Any]:
    """What the reader computes, compared with the quantized model."""
    np.save(folder / "ids.npy", ids.numpy())
    adapter = next((out / name for name in ("adapter.gguf", "adapter") if (out / name).exists()), None)
    script = Path(__file__).with_name("export_readers.py")
    python = readers.get(str(case.reader), readers[""])
    command = [python, str(script), str(case.reader), str(out), str(folder / "ids.npy"), str(folder / "logits.npy")]
    # vLLM takes half of the memory for its cache, and another transformers than the one of this process. On CPUs with
    # AMX its kernel for 4 bits rounds activations to 8 bits, unless it is told not to.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if case.reader == "vllm":
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_INT4_W4A8": "0"}
    done = subprocess.run(
        [*command, *([str(adapter)] if adapter else [])], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode != 0:
        return {"reader": case.reader, "refused": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    found = torch.tensor(np.load(folder / "logits.npy"))
    if case.reader == "vllm":  # which gives probabilities only
        expected = expected.log_softmax(-1)
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return {
        # Engines may print more, before and after it.
        "reader": [line for line in done.stdout.splitlines() if re.fullmatch(r"[\w-]+ \d[\w.+]*", line)][-1],
        "max_logit_difference": (expected - found).abs().max().item(),
        "kl": max(0.0, (p.exp() * (p - q)).sum(-1).mean().item()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="rows to make, * and ? allowed; default: what is new")
    parser.add_argument("--again", action="store_true", help="make all of them again")
    parser.add_argument("--readers", default=sys.executable, help="Python of an environment that has the readers")
    parser.add_argument("--vllm", default=sys.executable, help="Python of an environment that has vllm-cpu")
    parser.add_argument("--merged", type=Path, help="folder of the model that the demo has tuned and merged")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the next run goes on from there")
    options = parser.parse_args()
    ensure_converter()
    known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    models, end = Models(options.merged), time.monotonic() + 60 * options.minutes
    names = [case.name for case in cases()]
    for case in cases():
        is_asked = options.again or any(fnmatch.fnmatch(case.name, pattern) for pattern in options.patterns)
        is_new = case.name not in known and not options.patterns
        if not (is_asked or is_new) or time.monotonic() > end:
            continue
        if case.model == MERGED and options.merged is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            known[case.name] = row(case, models, {"": options.readers, "vllm": options.vllm}, Path(folder))
        print(case.name, {name: known[case.name].get(name) for name in ("refused", "is_exact", "kl")}, flush=True)
        rows = {name: known[name] for name in names if name in known}
        RESULT.write_text(json.dumps({"device": describe_device(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
