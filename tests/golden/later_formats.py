"""Models in the formats that came after version 0.1.0: which there are, and the program that writes their files.

    cd tests && PYTHONPATH=OLD:OLD/kernels python -m golden.later_formats COMMIT

writes them with the code of a checkout OLD of COMMIT, which must be the commit that brought a format or a later one
that still writes it as then. The files here are of c4c83e1.
"""

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig

from . import bits
from .models import SIZES, llama, logits_of, quantized, with_exact_weights

FILES = Path(__file__).parent / "later_files"


def mixtral() -> PreTrainedModel:
    """A Mixtral of one block, 32 channels wide, with two of four experts for each token."""
    config = MixtralConfig(**SIZES, intermediate_size=32, num_hidden_layers=1, num_local_experts=4)
    return with_exact_weights(MixtralForCausalLM(config))


# Each model with the version of the format that it needs.
MODELS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "stacks": (5, lambda: quantized(mixtral(), HQQConfig(nbits=4, group_size=16))),
    "symmetric": (6, lambda: quantized(llama(), HQQConfig(nbits=4, group_size=32, symmetric=True))),
    "double_quant": (7, lambda: quantized(llama(), HQQConfig(nbits=3, group_size=8, double_quant=True))),
    "row_parts": (7, lambda: quantized(llama(), AQLMConfig(nbits_per_codebook=4, rounds=1, row_parts=2))),
    "embeddings": (8, lambda: quantized(llama(), HQQConfig(nbits=4, group_size=32, quantize_embeddings=8))),
}


def main(commit: str) -> None:
    shutil.rmtree(FILES, ignore_errors=True)
    logits = {}
    for name, (_, make) in MODELS.items():
        model = make()
        pql.save_model(model, FILES / name)
        for extra in ("generation_config.json", "README.md"):
            (FILES / name / extra).unlink(missing_ok=True)
        logits[name] = logits_of(model)
    save_file(logits, FILES / "logits.safetensors")
    written_by = {"commit": commit, "transformers": version("transformers")} | bits.machine()
    (FILES / "written_by.json").write_text(json.dumps(written_by, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
