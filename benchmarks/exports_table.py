"""Exports to every format, read by the engines' own readers and compared with the quantized model.

Writes ``benchmarks/results/exports.json``, from which ``tables.py`` makes the table of ``docs/exports.md``. Models:
SmolLM2-135M on the first tokens of WikiText-2's test part, and tiny random ones of other architectures on random
tokens. Rows that the file has already are not made again, unless a pattern or ``--again`` asks for them.

    python benchmarks/exports_table.py ['SmolLM2 gguf*']   [--readers PYTHON]   [--minutes 10]
"""

import argparse
import fnmatch
import json
import math
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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import peft_quantlayers as pql

RESULT = Path(__file__).parent / "results" / "exports.json"
WIKITEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"
TOKENS = {"SmolLM2": 64, "tiny": 24}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 49152,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
TINY = {
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "Gemma 3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=256)),
    "Phi-3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=SIZES["vocab_size"], n_positions=128)
    ),
}


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

    @property
    def name(self) -> str:
        said = [f"{name}={value}" for name, value in self.fields.items()]
        said += [str(value) for value in self.options.values()]
        return " ".join([self.model, self.format, f"{self.nbits}/{self.group_size}", *said, self.reader or "-"])


def cases() -> list[Case]:
    whole = {"fields": {"integer_zero": True}}
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
        *(Case(model="SmolLM2", format=name, reader=None, **whole) for name in ("awq", "gptq")),
        *(Case(model="SmolLM2", format="mlx", reader="mlx", nbits=nbits) for nbits in (3, 8)),
        *(Case(model="SmolLM2", format="gguf", reader="llama.cpp", nbits=nbits) for nbits in (3, 5, 8)),
        Case(model="SmolLM2", format="gguf", reader="llama.cpp", group_size=32),
    ]
    for family in TINY:
        found.append(Case(model=family, format="gguf", reader="llama.cpp", group_size=32))
        found.append(Case(model=family, format="mlx", reader="mlx", group_size=32))
        found.append(
            Case(model=family, format="compressed-tensors", reader="compressed-tensors", group_size=32, **whole)
        )
    return found


class Models:
    """The quantized models, one at a time, with their tokens and logits."""

    def __init__(self) -> None:
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
        if case.model == "SmolLM2":
            model: Any = AutoModelForCausalLM.from_pretrained(demo_model_folder())
            text = WIKITEXT.read_text(encoding="utf-8")[:4000]
            ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)[: TOKENS["SmolLM2"]]
        else:
            model = TINY[case.model]().eval()
            ids = torch.randint(3, 4000, (TOKENS["tiny"],), generator=torch.Generator().manual_seed(0))
        config = pql.HQQConfig(nbits=case.nbits, group_size=case.group_size, **case.fields)
        pql.quantize_model(model, config, progress=False)
        with torch.no_grad():
            return model, ids, model(ids[None]).logits[0].float()


def row(case: Case, models: Models, readers: str, folder: Path) -> dict[str, Any]:
    model, ids, expected = models.quantized(case)
    result: dict[str, Any] = {
        "model": case.model, "format": case.format, "nbits": case.nbits, "group_size": case.group_size,
        "zeros": "integer" if case.fields.get("integer_zero") else "float",
        "options": {name: str(value).removeprefix("torch.") for name, value in case.options.items()},
    }  # fmt: skip
    out = folder / "MODEL"
    tokenizer = tokenizer_for(case, models, folder)
    try:
        report = pql.export(model, out, case.format, tokenizer=tokenizer, **case.options)
    except (ValueError, NotImplementedError) as error:
        return result | {"refused": str(error).replace("\n  ", " ").split(". ")[0]}
    weights = [*out.glob("*.safetensors"), *out.glob("*.gguf"), *out.glob("adapter/*.safetensors")]
    result |= {
        "relative_error": report.relative_error,
        "is_exact": report.is_exact,
        "bits": report.bits[1],
        "mb": sum(file.stat().st_size for file in weights) / 1e6,
        "command": report.serving_command.replace(str(out), "MODEL"),
    }
    return result if case.reader is None else result | read(case, out, ids, expected, readers, folder)


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
    case: Case, out: Path, ids: torch.Tensor, expected: torch.Tensor, readers: str, folder: Path
) -> dict[str, Any]:
    """What the reader computes, compared with the quantized model."""
    np.save(folder / "ids.npy", ids.numpy())
    adapter = next((out / name for name in ("adapter.gguf", "adapter") if (out / name).exists()), None)
    script = Path(__file__).with_name("export_readers.py")
    command = [readers, str(script), str(case.reader), str(out), str(folder / "ids.npy"), str(folder / "logits.npy")]
    done = subprocess.run(
        [*command, *([str(adapter)] if adapter else [])], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return {"reader": case.reader, "refused": (done.stderr.strip().splitlines() or ["no words"])[-1]}
    found = torch.tensor(np.load(folder / "logits.npy"))
    p, q = expected.log_softmax(-1), found.log_softmax(-1)
    return {
        "reader": done.stdout.strip().splitlines()[-1],
        "max_logit_difference": (expected - found).abs().max().item(),
        "kl": max(0.0, (p.exp() * (p - q)).sum(-1).mean().item()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="*", help="rows to make again, * and ? allowed; default: what is new")
    parser.add_argument("--again", action="store_true", help="make all of them again")
    parser.add_argument("--readers", default=sys.executable, help="Python of an environment that has the readers")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop then; the next run goes on from there")
    options = parser.parse_args()
    ensure_converter()
    known = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else {}
    models, end = Models(), time.monotonic() + 60 * options.minutes
    names = [case.name for case in cases()]
    for case in cases():
        is_asked = options.again or any(fnmatch.fnmatch(case.name, pattern) for pattern in options.patterns)
        if (case.name in known and not is_asked) or time.monotonic() > end:
            continue
        with tempfile.TemporaryDirectory() as folder:
            known[case.name] = row(case, models, options.readers, Path(folder))
        print(case.name, {name: known[case.name].get(name) for name in ("refused", "is_exact", "kl")}, flush=True)
        rows = {name: known[name] for name in names if name in known}
        RESULT.write_text(json.dumps({"device": describe_device(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
