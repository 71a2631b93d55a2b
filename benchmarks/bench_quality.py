"""The loss of quality by quantization: SmolLM2-135M on WikiText-2, ours and the ``hqq`` package.

Every variant is quantized, dequantized to float32 and put into the same dense model, so that only the weights
differ. Perplexity is over windows of 512 tokens that do not overlap; KL is the mean divergence of the next-token
distribution from the float model's, over the first windows. Scales and zeros of ours are float16, and count as such
for both; the ``hqq`` package keeps its own in float32 here, which favours it.

The model itself was read from a file of 4-bit blocks (GGUF Q4_1, groups of 32). So 4 bits with groups of 32 would lose
nothing, and with groups of 64 each group contains two grids, unlike the weights of other models.
"""

import argparse
import json
import math
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from _demo_model import demo_model_folder
from _device import describe_device
from _peers import peer_weight, quantize_with_hqq
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.evaluate import perplexity
from peft_quantlayers.layers import quantizable_modules
from peft_quantlayers.methods import get_method

TEXT = Path(__file__).parent / "data" / "wikitext2-test.txt"
RESULTS = Path(__file__).parent / "results" / "quality.json"
WINDOW = 512
# The float model's log-probabilities are kept for these: 96 MiB a window.
KL_WINDOWS = 8
SETTINGS = ((8, 64), (4, 64), (3, 64), (2, 64), (2, 16))
# "published" is the algorithm of the hqq package, which rounds the starting zero at 4 bits only.
MAKERS = ("ours", "ours, published algorithm", "hqq")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table. ``weight_error`` is the mean over the layers of |W - W_q| / |W|, Frobenius norms."""

    made_by: str
    nbits: int | None
    group_size: int | None
    bits_per_weight: float
    weight_error: float
    perplexity: float
    kl_to_float: float


def quantize(weight: Tensor, made_by: str, nbits: int, group_size: int) -> tuple[Tensor, float]:
    """The dequantized weight, float32, and its stored bits per weight."""
    if made_by == "hqq":
        peer = peer_weight(*quantize_with_hqq(weight, nbits=nbits, group_size=group_size, axis=1))
        return peer.dense, peer.bits_per_weight
    spec = pql.HQQSpec(
        nbits=nbits,
        group_size=group_size,
        refine_scale=made_by == "ours",
        round_zero=made_by == "ours" or nbits == 4,
    )
    method = get_method(spec.method)
    quantized = method.quantize(weight, spec)
    dense = method.dequantize(quantized)
    return dense, quantized.bits_per_weight


@torch.no_grad()
def evaluate(model: nn.Module, windows: Tensor, float_log_probs: list[Tensor]) -> tuple[float, float]:
    """Perplexity and mean KL to the float model; fills ``float_log_probs`` when it is empty."""
    is_float = not float_log_probs
    loss = divergence = 0.0
    for position, ids in enumerate(windows):
        log_probs = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        loss -= log_probs.gather(1, ids[1:, None]).sum().item()
        if position >= KL_WINDOWS:
            continue
        if is_float:
            float_log_probs.append(log_probs)
        else:
            reference = float_log_probs[position]
            divergence += ((reference - log_probs) * reference.exp()).sum().item()
    n_scored = WINDOW - 1
    return math.exp(loss / (len(windows) * n_scored)), divergence / (len(float_log_probs) * n_scored)


def measure(
    model: nn.Module, weights: dict[str, Tensor], made_by: str, setting: tuple[int, int], windows: Tensor, kept: list
) -> Row:
    """Put one variant's weights into ``model``, evaluate it, and put the float ones back."""
    errors, bits = [], []
    for name, weight in weights.items():
        dense, bits_per_weight = quantize(weight, made_by, *setting)
        errors.append(((dense - weight).norm() / weight.norm()).item())
        bits.append((bits_per_weight * weight.numel(), weight.numel()))
        model.get_submodule(name).weight.data = dense
    ppl, kl = evaluate(model, windows, kept)
    for name, weight in weights.items():
        model.get_submodule(name).weight.data = weight
    return Row(
        made_by=made_by,
        nbits=setting[0],
        group_size=setting[1],
        bits_per_weight=sum(b for b, _ in bits) / sum(n for _, n in bits),
        weight_error=statistics.mean(errors),
        perplexity=ppl,
        kl_to_float=kl,
    )


def show(row: Row) -> None:
    setting = "float32" if row.nbits is None else f"{row.nbits}-bit g{row.group_size}"
    print(
        f"{setting:10} {row.made_by:20} {row.bits_per_weight:6.2f} bits  weight error {row.weight_error:7.4f}  "
        f"perplexity {row.perplexity:12.3f}  KL {row.kl_to_float:9.5f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=16, help="windows of 512 tokens to score")
    args = parser.parse_args()

    folder = demo_model_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = AutoTokenizer.from_pretrained(folder)(TEXT.read_text(), return_tensors="pt").input_ids[0]
    windows = token_ids[: args.windows * WINDOW].view(args.windows, WINDOW)
    weights = {
        name: model.get_submodule(name).weight.data.clone() for name in quantizable_modules(model, pql.HQQConfig())
    }

    kept: list[Tensor] = []
    float_ppl, _ = evaluate(model, windows, kept)
    same = perplexity(model, token_ids, window=WINDOW, max_windows=2)
    if not math.isclose(same, evaluate(model, windows[:2], kept)[0], rel_tol=1e-4):
        raise SystemExit("evaluate() contradicts peft_quantlayers.evaluate.perplexity: nothing was measured.")
    rows = [
        Row(
            made_by="",
            nbits=None,
            group_size=None,
            bits_per_weight=32.0,
            weight_error=0.0,
            perplexity=float_ppl,
            kl_to_float=0.0,
        )
    ]
    show(rows[0])
    for setting in SETTINGS:
        for made_by in MAKERS:
            rows.append(measure(model, weights, made_by, setting, windows, kept))
            show(rows[-1])
    described = describe_device() | {"hqq": version("hqq")}
    result = {
        "device": described,
        "model": "SmolLM2-135M-Instruct, dequantized from GGUF Q4_1",
        "windows": args.windows,
        "window_tokens": WINDOW,
        "kl_windows": min(KL_WINDOWS, args.windows),
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
