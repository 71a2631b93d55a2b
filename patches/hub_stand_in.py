"""A stand-in for the hub model of PEFT's quantization tests: `python patches/hub_stand_in.py FOLDER`.

Writes ``FOLDER`` in the layout of the hub's cache, for ``HF_HOME`` and ``HF_HUB_OFFLINE=1``. The model has the
architecture of the real one and as many layers, so that the tests find what they count; it is narrow and random.
"""

import sys
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

MODEL_ID = "peft-internal-testing/opt-125m"
SIZES = {
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 12,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}


def write(home: Path) -> None:
    """Write the model into the cache ``home``."""
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(**SIZES, init_std=0.2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero at first, so that losing it would not show
                parameter.normal_(std=0.2)
    repository = home / "hub" / f"models--{MODEL_ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    model.save_pretrained(repository / "snapshots" / ("0" * 40))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
