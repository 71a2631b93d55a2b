"""Seconds and memory of one LoRA training step on SmolLM2-135M: ours, the peers', and the dense model's, interleaved.

A step is forward, backward and AdamW; LoRA of rank 8 on all linear layers, or finetuning of scales only. Before
anything is timed, loss and gradients are compared with those over dense layers with the same weights, and those of
scales with plain torch's. A wrong one of ours ends the run, one of a peer is recorded. Peers are PEFT's LoRA layers on
the layers of ``hqq`` and bitsandbytes; they are slow, and take fewer steps. If the CPU has no units for bfloat16
(``--avx2``), products in bfloat16 are emulated, and the models that use them are left out.

The limit is the time of the step's matrix products at the rate of a large product measured in the same run. A separate
process measures how far memory rises above the loaded model in two steps, for the first number of tokens.
"""

import argparse
import copy
import json
import random
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from _cpu import Clock, add_options, clock_of, ending, kernels_in_use, operations_per_second, settle
from _demo_model import demo_model_folder
from _device import describe_device
from _memory import MIB, extra_memory_of, in_own_process
from bitsandbytes.functional import dequantize_4bit
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_quantlayers as pql
from peft_quantlayers.evaluate import saved_for_backward
from quantlayers_kernels import native
from quantlayers_kernels.precision import product_dtype

RESULTS = Path(__file__).parent / "results"

# The layer whose bytes saved for the backward pass are counted.
OUT_FEATURES, IN_FEATURES, SAVED_TOKENS, SAVED_RANK = 1536, 576, 512, 16
RANK = 8
# Steps that a peer is timed for.
MAX_PEER_REPEATS = 3
# Of rounding. In bfloat16 it runs through thirty blocks, and ours multiplies in float32 where there are no units.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.15}

# Unoptimised codes: a step takes the same time with better ones.
AQLM = pql.AQLMConfig(rounds=0, beam=1)


def adapted(model: nn.Module, adapter: PeftConfig | None = None) -> nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, adapter or lora).train()


def loaded(dtype: torch.dtype, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(demo_model_folder(), dtype=dtype, **options)


def fused(model: nn.Module) -> nn.Module:
    pql.fuse_projections(model)
    return model


def ours(dtype: torch.dtype, config: pql.QuantConfig | None, adapter: PeftConfig | None = None) -> nn.Module:
    return adapted(loaded(dtype, quantization_config=config), adapter)


def prepared(dtype: torch.dtype, config: pql.QuantConfig) -> nn.Module:
    """As the README does it: norms and head in float32."""
    model = loaded(dtype, quantization_config=config)
    return adapted(pql.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False))


def hqq_package(dtype: torch.dtype) -> nn.Module:
    """The package's layers in a dense model, since transformers 5 does not put them there, and PEFT's LoRA on them."""
    model = loaded(dtype)
    settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
    settings["weight_quant_params"]["optimize"] = False  # a step takes the same time with better codes
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, HQQLinear(linear, settings, compute_dtype=dtype, device="cpu"))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    pql.unregister()
    try:
        return adapted(model, LoraConfig(r=RANK, target_modules=targets, init_lora_weights=False))
    finally:
        pql.register()


def bitsandbytes_nf4(dtype: torch.dtype) -> nn.Module:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return adapted(loaded(dtype, quantization_config=config, device_map={"": "cpu"}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense float32": lambda: ours(torch.float32, None),
    "HQQ 4-bit, float32": lambda: ours(torch.float32, pql.HQQConfig(nbits=4)),
    "HQQ 4-bit, fused, float32": lambda: fused(ours(torch.float32, pql.HQQConfig(nbits=4))),
    "HQQ 3-bit, float32": lambda: ours(torch.float32, pql.HQQConfig(nbits=3)),
    "HQQ 2-bit, float32": lambda: ours(torch.float32, pql.HQQConfig(nbits=2)),
    "AQLM 2x8, float32": lambda: ours(torch.float32, AQLM),
    "AQLM 2x8, fused, float32": lambda: fused(ours(torch.float32, AQLM)),
    "HQQ 4-bit, scales only": lambda: ours(torch.float32, pql.HQQConfig(nbits=4), pql.QuantScalesConfig()),
    "AQLM 2x8, scales only": lambda: ours(torch.float32, AQLM, pql.QuantScalesConfig()),
    "dense bfloat16": lambda: ours(torch.bfloat16, None),
    "HQQ 4-bit, bfloat16": lambda: ours(torch.bfloat16, pql.HQQConfig(nbits=4)),
    "HQQ 4-bit, prepared bfloat16": lambda: prepared(torch.bfloat16, pql.HQQConfig(nbits=4)),
}
PEERS: dict[str, Callable[[], nn.Module]] = {
    "PEFT + bitsandbytes NF4, float32": lambda: bitsandbytes_nf4(torch.float32),
    "PEFT + hqq package, float32": lambda: hqq_package(torch.float32),
    "PEFT + hqq package, bfloat16": lambda: hqq_package(torch.bfloat16),
}
BUILDERS = MODELS | PEERS
# What multiplies in bfloat16 whatever the CPU has units for.
IN_BFLOAT16 = ("dense bfloat16", "PEFT + hqq package, bfloat16")


def refusal_of_aqlm_package() -> str:
    """The error of the ``aqlm`` package in a backward pass on a CPU; "" if there is none."""
    from aqlm import QuantizedLinear

    layer = QuantizedLinear(IN_FEATURES, OUT_FEATURES, 8, 1, 2, 8, bias=False)
    layer.codes.data = torch.randint(-128, 128, layer.codes.shape, dtype=torch.int8)
    layer.codebooks.data, layer.scales.data = torch.randn(layer.codebooks.shape), torch.ones(layer.scales.shape)
    try:
        layer(torch.randn(SAVED_TOKENS, IN_FEATURES, requires_grad=True)).sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
    return ""


def operations_of_step(model: nn.Module, tokens: int) -> int:
    """Multiplications and additions of a LoRA step's matrix products, attention's own aside.

    Two products for each frozen weight, forward and for the input's gradient, three for those of the adapters. The
    first block's q, k and v need no gradient of their input.
    """
    config = model.config
    hidden, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    head, first = config.vocab_size * hidden, hidden * (hidden + 2 * kv)
    shapes = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)] + 3 * [
        (hidden, config.intermediate_size)
    ]
    frozen = config.num_hidden_layers * sum(rows * columns for rows, columns in shapes)
    adapters = config.num_hidden_layers * sum(RANK * (rows + columns) for rows, columns in shapes)
    return 2 * tokens * (2 * (frozen + head) - first + 3 * adapters)


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight behind a quantized layer, ours or a peer's."""
    if isinstance(layer, pql.QuantizedLinear):
        return layer.dequantize(layer.compute_dtype)
    if isinstance(layer, HQQLinear):
        return layer.dequantize().clone()
    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


@contextmanager
def on_dense_layers(model: nn.Module) -> Iterator[None]:
    """Plain dense layers under the adapters, with the same weights."""
    replaced = []
    for layer in [module for module in model.modules() if isinstance(module, BaseTunerLayer)]:
        weight = dense_weight(layer.base_layer)
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        replaced.append((layer, layer.base_layer))
        layer.base_layer = dense
    try:
        yield
    finally:
        for layer, base in replaced:
            layer.base_layer = base


@contextmanager
def in_plain_torch() -> Iterator[None]:
    library = native.library
    native.library = lambda: None
    try:
        yield
    finally:
        native.library = library


def loss_and_gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]
    model.zero_grad()
    return found


def gradient_error(name: str, model: nn.Module, ids: Tensor) -> float:
    """The relative error of the loss, or of all gradients together, over the tolerance for rounding."""
    found = loss_and_gradients(model, ids)
    # Without bfloat16 units, torch's own products have a larger error than the difference that is tested.
    is_emulated = name.endswith("bfloat16") and product_dtype(torch.bfloat16, ids.device) != torch.bfloat16
    is_mixed = name.endswith(("scales only", "prepared bfloat16"))
    with in_plain_torch() if is_emulated or is_mixed else on_dense_layers(model):
        expected = loss_and_gradients(model, ids)
    dtype = torch.bfloat16 if name.endswith("bfloat16") else torch.float32
    pairs = [(found[0], expected[0])]
    pairs.append(tuple(torch.cat([each.float().flatten() for each in parts[1:]]) for parts in (found, expected)))
    errors = [((ours - truth).float().norm() / truth.float().norm()).item() for ours, truth in pairs]
    return max(errors) / TOLERANCES[dtype]


def step_of(model: nn.Module) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5)

    def step(ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_per_step(
    models: dict[str, nn.Module], ids: torch.Tensor, repeats: int, clock: Clock
) -> dict[str, list[float]]:
    """Seconds of each, taking turns; the first round warms up."""
    steps = {name: step_of(model) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, step in random.sample(sorted(steps.items()), len(steps)):
            if name in PEERS and repeat > MAX_PEER_REPEATS:
                continue
            start = clock()
            step(ids)
            if repeat:
                seconds[name].append(clock() - start)
    return seconds


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, and other tensors that the peers keep."""
    found = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, HQQLinear):
            found += [value for value in module.meta.values() if isinstance(value, Tensor)]
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return found + [state.absmax for state in states if state is not None]


def memory_of(name: str, batch: int, tokens: int) -> dict[str, float]:
    """MiB of the model's tensors, and how far the process rises above the loaded model in two steps."""
    model = BUILDERS[name]()
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # transformers maps the file, whose pages would count as they are read
    step = step_of(model)
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens))
    tensors = {part.data_ptr(): part.nbytes for part in tensors_of(model)}
    extra = extra_memory_of(lambda: [step(ids) for _ in range(2)])
    return {"model_mib": sum(tensors.values()) / MIB, "extra_peak_mib": extra["extra_peak_mib"]}


def saved_bytes(layer: nn.Module, dtype: torch.dtype, dropout: float) -> int:
    """Bytes that one layer with LoRA of rank 16 saves for the backward pass of ``SAVED_TOKENS`` tokens."""
    model = nn.ModuleDict({"layer": layer})
    model = get_peft_model(model, LoraConfig(r=SAVED_RANK, lora_dropout=dropout, target_modules=["layer"]))
    return saved_for_backward(
        model.base_model.model["layer"], torch.randn(SAVED_TOKENS, IN_FEATURES, dtype=dtype, requires_grad=True)
    )


def quantized(layer: nn.Module, config: pql.QuantConfig) -> nn.Module:
    return pql.quantize_model(nn.Sequential(copy.deepcopy(layer)), config, progress=False)[0]


def saved_rows() -> list[dict[str, object]]:
    """Bytes saved for the backward pass: ours, PEFT's on a plain linear, and PEFT's on the ``hqq`` package's layer."""
    rows: list[dict[str, object]] = []
    for dtype, dropout in ((torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.bfloat16, 0.1)):
        floor = SAVED_TOKENS * (IN_FEATURES * dtype.itemsize + SAVED_RANK * 4 + (IN_FEATURES if dropout else 0))
        dense = nn.Linear(IN_FEATURES, OUT_FEATURES, bias=False).to(dtype)
        settings = BaseQuantizeConfig(nbits=4, group_size=64, axis=1)
        layers = {
            "HQQ 4-bit": quantized(dense, pql.HQQConfig(nbits=4)),
            "AQLM 2x8": quantized(dense, AQLM),
            "PEFT on a dense layer": copy.deepcopy(dense),
            "PEFT on the hqq package": HQQLinear(copy.deepcopy(dense), settings, compute_dtype=dtype, device="cpu"),
        }
        for name, layer in layers.items():
            if name.endswith("hqq package"):
                pql.unregister()
            saved = saved_bytes(layer, dtype, dropout)
            pql.register()
            rows.append({"layer": name, "dtype": str(dtype)[6:], "dropout": dropout, "bytes": saved, "floor": floor})
            print(f"{name:24} {dtype}, dropout {dropout}: {saved / floor:.2f} x the minimum of {floor} bytes saved")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--models", nargs="+", choices=BUILDERS, default=list(BUILDERS))
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    add_options(parser)
    args = parser.parse_args()
    settle(args)
    if args.memory_of:
        name, batch, tokens = args.memory_of
        print(json.dumps(memory_of(name, int(batch), int(tokens))))
        return
    clock, clock_name = clock_of(args)
    random.seed(0)
    saved = saved_rows()
    has_units = product_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    left_out = [] if has_units else [name for name in IN_BFLOAT16 if name in args.models]
    operations = {"float32": operations_per_second(torch.float32, args.repeats, clock)}
    if has_units:
        operations["bfloat16"] = operations_per_second(torch.bfloat16, args.repeats, clock)

    # The dense one is what all others are compared with.
    chosen = {"dense float32", *args.models} - set(left_out)
    models = {name: build() for name, build in BUILDERS.items() if name in chosen}
    torch.manual_seed(0)
    dense_model = models["dense float32"]
    vocabulary = dense_model.config.vocab_size
    is_right = {}
    for name, model in models.items():
        error = 0.0 if name.startswith("dense") else gradient_error(name, model, torch.randint(0, vocabulary, (1, 32)))
        is_right[name] = error < 1
        if not is_right[name]:
            message = f"{name}: a gradient is off by {error:.1e} times what rounding allows"
            if name not in PEERS:
                raise SystemExit(f"{message}: nothing was timed.")
            print(message, flush=True)

    rows = []
    for tokens in args.tokens:
        ids = torch.randint(0, vocabulary, (args.batch, tokens))
        seconds = seconds_per_step(models, ids, args.repeats, clock)
        dense = statistics.median(seconds["dense float32"])
        for name, times in seconds.items():
            median = statistics.median(times)
            is_first = tokens == args.tokens[0]
            memory = json.loads(in_own_process("--memory-of", name, str(args.batch), str(tokens))) if is_first else {}
            dtype = "bfloat16" if name.endswith("bfloat16") and has_units else "float32"
            limit = operations_of_step(dense_model, ids.numel()) / operations[dtype]
            rows.append(
                {
                    "model": name,
                    "batch": args.batch,
                    "tokens": tokens,
                    "is_right": is_right[name],
                    "repeats": len(times),
                    "median_s": median,
                    "min_s": min(times),
                    "max_s": max(times),
                    "rate_vs_dense_float32": dense / median,
                    "rate_vs_dense_float32_of_minima": min(seconds["dense float32"]) / min(times),
                    "limit_s": limit,
                    **memory,
                }
            )
            print(
                f"{args.batch} x {tokens:4} tokens  {name:32}  {median:6.3f} s  "
                f"({min(times):.3f} to {max(times):.3f})  {dense / median:5.2f} x the dense float32 rate, products "
                f"alone {limit:.3f} s; MiB: {memory}",
                flush=True,
            )
    device = describe_device() | {name: version(name) for name in ("hqq", "aqlm", "bitsandbytes")}
    result = {
        "device": device | {"kernels": kernels_in_use()},
        "command": shlex.join(["python", "benchmarks/bench_lora_step.py", *sys.argv[1:]]),
        "clock": clock_name,
        "product_gflop_per_s": {dtype: rate / 1e9 for dtype, rate in operations.items()},
        "refused": {"aqlm package": refusal_of_aqlm_package()},
        "left_out": left_out,
        "rows": rows,
        "saved": saved,
    }
    path = RESULTS / f"lora_step{ending(args)}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
