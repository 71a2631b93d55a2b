"""What each transform of the float weights gives before HQQ, plain and calibrated: SmolLM2-135M, KL to the float one.

Groups of 64, the calibration tokens and both texts of ``bench_calibration_options.py``; ``--blocks 4`` takes the first
blocks of the model for the whole of it. Rows are written as they are made.

The model's weights were read from blocks of 32 neighbouring inputs with one grid each, which flatters whatever keeps
neighbours together. ``--permuted`` puts its channels into a random order first, which changes nothing that the model
computes: there no transform destroys what other models do not have.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from _demo_model import demo_model_folder
from _device import describe_device
from _processor import processor_name
from bench_calibration import N_TOKENS, bits_per_weight, help_text
from bench_calibration_options import GROUP_SIZE, Texts, load
from bench_quality import TEXT, WINDOW, evaluate
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

import peft_quantlayers as pql
from quantlayers_kernels.hadamard import rotate, rotate_back
from quantlayers_kernels.hqq import cpu

RESULTS = Path(__file__).parent / "results" / "transforms.json"
# The default when most rows were measured, for all of them.
SHRINKAGE = 0.3
PERMUTED_RESULTS = RESULTS.with_name("transforms_permuted.json")
TRANSFORMS: dict[str, list[pql.Transform]] = {
    "none": [],
    "AWQ scales": [pql.AWQScales()],
    "AWQ scales, clipped": [pql.AWQScales(clip=True)],
    "rotation": [pql.Rotation()],
    "rotation, random": [pql.Rotation(kind="random")],
    "rotation of heads": [pql.Rotation(residual=False)],
    "rotation, then AWQ scales": [pql.Rotation(), pql.AWQScales()],
    "rotation, learned from none": [pql.Rotation(kind="learned")],
    "rotation, learned from Hadamard": [pql.Rotation(kind="learned", start="hadamard")],
    "rotation of heads, learned": [pql.Rotation(kind="learned", residual=False)],
    "rotation of heads, learned, then permutation": [
        pql.Rotation(kind="learned", residual=False),
        pql.Permutation(heads=False),
    ],
    "rotation of heads, learned, then AWQ scales": [pql.Rotation(kind="learned", residual=False), pql.AWQScales()],
    "permutation by inputs": [pql.Permutation(by="inputs", residual=False)],
    "permutation by weights": [pql.Permutation(by="weights", residual=False)],
    "permutation by both": [pql.Permutation(by="both", residual=False)],
    "permutation by weights, with the stream": [pql.Permutation(by="weights")],
    "permutation by both, with the stream": [pql.Permutation(by="both")],
    "permutation, then AWQ scales": [pql.Permutation(), pql.AWQScales()],
    "SmoothQuant, alpha 0.5": [pql.SmoothQuant(alpha=0.5)],
    "SmoothQuant, alpha 0.8": [pql.SmoothQuant(alpha=0.8)],
}
# R4, which no weight before it can hold: the layers themselves rotate their inputs, the down projections or all.
ONLINE, ALL_ONLINE = "rotation before down_proj, online", "rotation before all layers, online"
TRANSFORMS |= {ONLINE: [], ALL_ONLINE: []}
# By ``set_activation_bits``: the integer kernels, whose inputs have a scale for each 16 columns.
ROUNDED_INPUTS = "8-bit inputs"
# As other engines do it, computed in floats: one scale for each row of a weight, and one for each token's inputs.
INPUTS_BY_TOKEN = "one input scale a token"
QUANTIZERS = ("plain", "calibrated", ROUNDED_INPUTS, INPUTS_BY_TOKEN)
WIDTHS = (8, 4, 3, 2)
ROWS = [f"{nbits} bits, {quantizer}, {name}" for nbits in WIDTHS for quantizer in QUANTIZERS for name in TRANSFORMS]


@torch.no_grad()
def permute_channels(model: PreTrainedModel) -> None:
    """Put the channels of the residual stream, and of each MLP, into a random order."""
    generator = torch.Generator().manual_seed(0)
    stream = torch.randperm(model.config.hidden_size, generator=generator)
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, stream])  # the head is the same tensor
    model.model.norm.weight.copy_(model.model.norm.weight[stream])
    for layer in model.model.layers:
        inner = torch.randperm(model.config.intermediate_size, generator=generator)
        attention, mlp = layer.self_attn, layer.mlp
        for reader in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            reader.weight.copy_(reader.weight[:, stream])
        for writer in (attention.o_proj, mlp.down_proj):
            writer.weight.copy_(writer.weight[stream])
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.copy_(norm.weight[stream])
        for source in (mlp.gate_proj, mlp.up_proj):
            source.weight.copy_(source.weight[inner])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, inner])


def rounded_inputs(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Each token's inputs as 8-bit integers times one scale: what an integer product computes, in floats."""
    (x,) = args
    is_rotated = getattr(layer.spec, "rotate_inputs", False)
    x = rotate(x) if is_rotated else x
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    rounded = (x / scale).round() * scale
    return (rotate_back(rounded) if is_rotated else rounded,)


def config_of(nbits: int, quantizer: str, transform: str) -> pql.QuantConfig:
    group_size = None if quantizer == INPUTS_BY_TOKEN else GROUP_SIZE
    if transform not in (ONLINE, ALL_ONLINE):
        return pql.HQQConfig(nbits=nbits, group_size=group_size)
    overrides = {"down_proj": {"rotate_inputs": True}}
    return pql.RotatedHQQConfig(
        nbits=nbits, group_size=group_size, rotate_inputs=transform == ALL_ONLINE, overrides=overrides
    )


def measure(
    name: str, model: PreTrainedModel, calibration: pql.Calibration, texts: dict[str, Texts]
) -> dict[str, Any]:
    width, quantizer, transform = name.replace(" bits", "").split(", ", 2)
    config = config_of(int(width), quantizer, transform)
    began = time.process_time()
    if TRANSFORMS[transform]:
        pql.transform_model(model, TRANSFORMS[transform], config=config, calibration=calibration, progress=False)
    transformed = time.process_time()
    data = calibration if quantizer == "calibrated" else None
    pql.quantize_model(model, config, calibration=data, progress=False)
    if quantizer == ROUNDED_INPUTS:
        pql.set_activation_bits(model, 8)
    if quantizer == INPUTS_BY_TOKEN:
        for layer in pql.quantized_modules(model).values():
            layer.register_forward_pre_hook(rounded_inputs)
    row: dict[str, Any] = {
        "name": name,
        "blocks": model.config.num_hidden_layers,
        "bits_per_weight": bits_per_weight(model),
        "cpu": processor_name(),
        "transform_cpu_s": transformed - began,
        "quantize_cpu_s": time.process_time() - transformed,
    }
    for text, (windows, kept) in texts.items():
        row[f"kl_{text}"] = evaluate(model, windows, kept)[1]
    return row


def texts_and_ids(folder: Path, float_model: PreTrainedModel) -> tuple[dict[str, Texts], Tensor]:
    """Windows of two texts with the float model's log-probabilities, and the ids to calibrate on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    wikitext = tokenizer(TEXT.read_text(), return_tensors="pt").input_ids[0]
    texts: dict[str, Texts] = {}
    for text, ids, n_windows in (("wikitext", wikitext, 4), ("help", help_text(tokenizer), 4)):
        windows, kept = ids[: n_windows * WINDOW].view(n_windows, WINDOW), []
        evaluate(float_model, windows, kept)
        texts[text] = (windows, kept)
    return texts, wikitext[len(wikitext) // 2 :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, help="of the model, from the first")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="names of rows, or parts of names; in their order")
    parser.add_argument("--permuted", action="store_true", help="the model with its channels in a random order")
    args = parser.parse_args()
    cpu.MAX_ROUNDED_TOKENS = WINDOW  # every token is rounded, as those are that are generated one at a time
    results = PERMUTED_RESULTS if args.permuted else RESULTS
    torch.manual_seed(0)
    folder = demo_model_folder()
    texts, calibration_ids = texts_and_ids(folder, load(folder, args.blocks))
    calibration = pql.Calibration(data=calibration_ids, n_tokens=N_TOKENS, shrinkage=SHRINKAGE)
    for name in [name for part in args.rows for name in ROWS if part == name or (part not in ROWS and part in name)]:
        model = load(folder, args.blocks)
        if args.permuted:
            permute_channels(model)
        row = measure(name, model, calibration, texts)
        print(json.dumps(row), flush=True)
        known = json.loads(results.read_text())["rows"] if results.exists() else []
        rows = {(each["name"], each["blocks"]): each for each in known} | {(name, row["blocks"]): row}
        result = {
            "device": describe_device(),
            "model": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
            "calibration_tokens": N_TOKENS,
            "group_size": GROUP_SIZE,
            "rows": sorted(rows.values(), key=lambda each: (-each["blocks"], ROWS.index(each["name"]))),
        }
        results.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
