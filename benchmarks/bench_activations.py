"""What activations of 8 bits cost: SmolLM2-135M on WikiText-2, beside the same quantized model with exact ones.

KL is the mean divergence of the next-token distribution from the exact model's. Blocks of 16 columns are what the
kernels round; other sizes are computed from the definition of the rounding, in float32, to compare.
"""

import argparse
import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from _cpu import kernels_in_use
from _demo_model import demo_model_folder
from _device import describe_device
from bench_quality import TEXT, WINDOW
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.evaluate.divergence import divergence
from quantlayers_kernels.hqq import cpu, integer_reference

RESULTS = Path(__file__).parent / "results" / "activations.json"
# (nbits, group size, columns of a block)
SETTINGS = ((4, 64, 16), (4, 64, 32), (4, 64, 64), (3, 64, 16), (2, 16, 16), (8, 64, 16))


@contextmanager
def rounded_inputs(model: torch.nn.Module, block: int) -> Iterator[None]:
    """The inputs of all quantized layers rounded in blocks of ``block`` columns."""

    def rounded(layer: pql.QuantizedLinear, inputs: tuple[Tensor]) -> tuple[Tensor]:
        x = inputs[0].reshape(-1, layer.in_features)
        codes, scales = integer_reference.rounded_activations(x, layer.in_features // block, block)
        return ((codes * scales).view_as(inputs[0]),)

    hooks = [layer.register_forward_pre_hook(rounded) for layer in pql.quantized_modules(model).values()]
    yield
    for hook in hooks:
        hook.remove()


def main() -> None:
    cpu.MAX_ROUNDED_TOKENS = WINDOW  # every token is rounded, as those are that are generated one at a time
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8, help="windows of 512 tokens to score")
    options = parser.parse_args()
    folder = demo_model_folder()
    token_ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt", verbose=False).input_ids[
        0
    ]
    rows, exact = [], None
    for nbits, group_size, block in SETTINGS:
        if exact is None or (nbits, group_size) != (rows[-1]["nbits"], rows[-1]["group_size"]):
            config = pql.HQQConfig(nbits=nbits, group_size=group_size)
            exact = AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=config, dtype=torch.float32
            ).eval()
        model = copy.deepcopy(exact)
        is_measured = block == integer_reference.BLOCK
        if is_measured:
            pql.set_activation_bits(model, 8)
        with nullcontext() if is_measured else rounded_inputs(model, block):
            found = divergence(model, exact, token_ids, max_windows=options.windows, window=WINDOW, progress=False)
        row = {"nbits": nbits, "group_size": group_size, "block": block, "is_measured": is_measured}
        rows.append(row | {"kl": found.kl, "top1_agreement": found.top1_agreement})
        print(rows[-1], flush=True)
    measured = {
        "device": describe_device() | {"kernels": kernels_in_use()},
        "model": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
        "windows": options.windows,
        "window_tokens": WINDOW,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
