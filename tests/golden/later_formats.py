"""Models in the formats that came after version 0.1.0: which there are, and the program that writes their files.

    cd tests && PYTHONPATH=OLD:OLD/kernels python -m golden.later_formats COMMIT NAME ...

writes the named ones with the code of a checkout OLD of COMMIT, its compiled kernels built. COMMIT must be the one
that brought a format or a later one that still writes it as then; ``written_by.json`` says which it was for each
model. A folder that is there already stays: only the digests of what that code reads from it are written.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig
from peft_quantlayers.methods import config_type, get_method

from . import bits
from .files import digest, tensors_of
from .models import SIZES, llama, logits_of, quantized, with_exact_weights

FILES = Path(__file__).parent / "later_files"


def mixtral() -> PreTrainedModel:
    """A Mixtral of one block, 32 channels wide, with two of four experts for each token."""
    config = MixtralConfig(**SIZES, intermediate_size=32, num_hidden_layers=1, num_local_experts=4)
    return with_exact_weights(MixtralForCausalLM(config))


def in_two_compute_dtypes() -> nn.Module:
    """A bfloat16 Llama whose attention computes in float32, and whose MLP in the model's own dtype."""
    model = llama().bfloat16()
    quantized(model, HQQConfig(nbits=4, group_size=16, compute_dtype="float32", skip_modules=["mlp"]))
    return quantized(model, HQQConfig(nbits=3, group_size=16, skip_modules=["self_attn"]))


def in_nf4() -> nn.Module:
    """A Llama in NF4, with a block for each row of 32 inputs; NF4's config had no public name at first."""
    return quantized(llama(), config_type(get_method("nf4").spec_type)(block_size=32))


# Each model with the version of the format that it was written in. NF4 came with the second version, whose branches it
# does not need; whatever is saved since the fourth has sentinels.
MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "nf4": (1, in_nf4),
    "compute_dtypes": (3, in_two_compute_dtypes),
    "sentinels": (4, lambda: quantized(llama(), HQQConfig(nbits=4, group_size=32))),
    "stacks": (5, lambda: quantized(mixtral(), HQQConfig(nbits=4, group_size=16))),
    "symmetric": (6, lambda: quantized(llama(), HQQConfig(nbits=4, group_size=32, symmetric=True))),
    "double_quant": (7, lambda: quantized(llama(), HQQConfig(nbits=3, group_size=8, double_quant=True))),
    "row_parts": (7, lambda: quantized(llama(), AQLMConfig(nbits_per_codebook=4, rounds=1, row_parts=2))),
    "rotated_hqq": (4, lambda: quantized(llama(), config_type(get_method("rotated_hqq").spec_type)(group_size=32))),
    "embeddings": (8, lambda: quantized(llama(), HQQConfig(nbits=4, group_size=32, quantize_embeddings=8))),
}


# By hand: whose weights are sums, so that other processors may give them other last bits.
SUMMED = ("rotated_hqq",)


def dequantized_digests(model: nn.Module) -> dict[str, str]:
    """The digest of each quantized weight as float32, by the name of its layer."""
    # Not by the package's functions, which came one after another; transformers' models have a ``dequantize`` too.
    layers = [(name, module) for name, module in model.named_modules() if not isinstance(module, PreTrainedModel)]
    return {name: digest(layer.dequantize(torch.float32)) for name, layer in layers if hasattr(layer, "dequantize")}


def _with_entry(file: Path, name: str, value: dict[str, str]) -> None:
    entries = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(dict(sorted((entries | {name: value}).items())), indent=1) + "\n")


def write(name: str, commit: str) -> None:
    """One model's folder, its logits, and who wrote it."""
    _, make = MODELS[name]
    model = make()
    pql.save_model(model, FILES / name)
    for extra in ("generation_config.json", "README.md"):
        (FILES / name / extra).unlink(missing_ok=True)
    logits = tensors_of(FILES / "logits.safetensors") if (FILES / "logits.safetensors").exists() else {}
    save_file(logits | {name: logits_of(model)}, FILES / "logits.safetensors")
    written_by = {"commit": commit, "transformers": version("transformers")} | bits.machine()
    _with_entry(FILES / "written_by.json", name, written_by)


def main(commit: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        if not (FILES / name).exists():
            write(name, commit)
        if name in SUMMED:
            continue
        read = AutoModelForCausalLM.from_pretrained(FILES / name)
        _with_entry(FILES / "dequantized.json", name, dequantized_digests(read))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
