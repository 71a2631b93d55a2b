"""What rotating its inputs costs a layer: HQQ at 4 bits, plain and rotated, and dense float32, in turns.

The rotation is ``n * (p + q)`` products a token for ``n = p * q`` inputs, beside the layer's ``n * out_features``.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
from _cpu import Clock, add_options, begin, ending, kernels_in_use
from _device import describe_device
from _shapes import SHAPES
from torch import nn

import peft_quantlayers as pql

RESULTS = Path(__file__).parent / "results"
NAMES = ("SmolLM2-135M q_proj", "SmolLM2-135M down_proj", "Llama-3-8B q_proj", "Llama-3-8B down_proj")
# By hand: the same bits with and without a rotation.
CONFIGS: dict[str, pql.QuantConfig] = {"plain": pql.HQQConfig(nbits=4), "rotated": pql.RotatedHQQConfig(nbits=4)}
# Multiplications and additions between two looks at the clock, at least.
WORK = 1 << 27


def layers_of(out_features: int, in_features: int) -> dict[str, nn.Module]:
    """The same random layer, dense and quantized; wrong products end the run."""
    dense = nn.Linear(in_features, out_features, bias=False)
    found: dict[str, nn.Module] = {"dense float32": dense}
    x = torch.randn(3, in_features)
    for name, config in CONFIGS.items():
        layer = pql.layer_type(config.method).from_linear(dense, config.spec_for("layer")).eval()
        truth = x.double() @ layer.weight.double().t()
        if not (layer(x).double() - truth).norm() < 1e-5 * truth.norm():
            raise SystemExit(f"{name}: the product is wrong; nothing was timed.")
        found[name] = layer
    return found


def seconds_per_call(layers: dict[str, nn.Module], x: torch.Tensor, repeats: int, clock: Clock) -> dict[str, float]:
    """Medians; all take turns, in a new order each time, and the first round warms up."""
    calls = max(1, WORK // (2 * x.numel() * layers["dense float32"].out_features))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for repeat in range(repeats + 1):
        for name in random.sample(sorted(layers), len(layers)):
            start = clock()
            for _ in range(calls):
                layers[name](x)
            if repeat:
                seconds[name].append((clock() - start) / calls)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(NAMES))
    add_options(parser)
    args = parser.parse_args()
    clock, clock_name = begin(args)
    rows = []
    for shape in args.shapes:
        layers = layers_of(*SHAPES[shape])
        for n_tokens in args.tokens:
            medians = seconds_per_call(layers, torch.randn(n_tokens, SHAPES[shape][1]), args.repeats, clock)
            rows.append({"shape": shape, "tokens": n_tokens, "median_s": medians})
            times = ", ".join(f"{name} {1e6 * median:.1f} us" for name, median in medians.items())
            print(f"{shape}, {n_tokens} tokens: {times}", flush=True)
    device = describe_device() | {"kernels": kernels_in_use()}
    result = {"device": device, "clock": clock_name, "rows": rows}
    (RESULTS / f"rotated{ending(args)}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
