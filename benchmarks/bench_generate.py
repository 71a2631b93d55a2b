"""Tokens per second of whole models on a CPU, prompt and generation: ours with and without an adapter, and the peers'.

The model is SmolLM2-135M, or with ``--shape 1b`` a Llama of a billion random weights. Each way generates greedily by
transformers' ``generate``, llama.cpp through its C API from the same 4-bit model exported to GGUF (it rounds
activations to 8 bits, always). All take turns; the first turn warms up. A generated token's time includes
sampling and transformers' own Python.

The limit is reading every stored weight once at the memory's bandwidth, measured in the same run. A weight that stays
in a cache can be read faster.

The profile takes one token of ours apart: kernels, head, attention, and the rest, which is Python and small operators.
"""

import argparse
import gc
import json
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from _cpu import Clock, add_options, begin, ending, kernels_in_use, memory_bandwidth
from _demo_model import demo_model_folder, ensure_converter
from _device import describe_device
from _llama_cpp import LlamaCpp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import peft_quantlayers as pql

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 64
RANK = 8


@dataclass(frozen=True, kw_only=True)
class Way:
    """A model that generates.

    Fields:
        generate: prompt (n_tokens,) and a number of tokens to add, greedily.
        nbytes: of the weights that a token reads.
        model: where there is one of transformers.
    """

    generate: Callable[[Tensor, int], object]
    nbytes: int
    model: nn.Module | None = None


class TorchInt4(nn.Module):
    """torch's own product with 4-bit weights and bfloat16 inputs, with random scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        codes = torch.randint(0, 16, (out_features, in_features), dtype=torch.int32)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
        self.scale_and_zero = (0.01 * torch.rand(in_features // GROUP_SIZE, out_features, 2)).bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, GROUP_SIZE, self.scale_and_zero)
        return y.view(*x.shape[:-1], -1)


def stored_bytes(model: nn.Module) -> int:
    """Of all parameters and buffers that a token reads: not of an embedding that is no head."""
    head = model.get_output_embeddings().weight if isinstance(model, PreTrainedModel) else None
    embedding = model.get_input_embeddings().weight if isinstance(model, PreTrainedModel) else None
    skipped = set() if embedding is None or embedding is head else {id(embedding)}
    tensors = {id(each): each for module in model.modules() for each in vars(module).values() if torch.is_tensor(each)}
    tensors |= {id(each): each for each in model.parameters()}
    return sum(each.nbytes for key, each in tensors.items() if key not in skipped)


def of_transformers(model: nn.Module) -> Way:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.generation_config.eos_token_id = None  # all generate as many tokens
    base.generation_config.pad_token_id = 0
    nbytes = stored_bytes(model)

    def generate(prompt: Tensor, n_tokens: int) -> Tensor:
        return model.generate(input_ids=prompt[None], max_new_tokens=n_tokens, do_sample=False)

    return Way(generate=generate, nbytes=nbytes, model=model.eval())


def of_llama_cpp(file: Path, n_threads: int) -> Way:
    engine = LlamaCpp(str(file), n_threads=n_threads)

    def generate(prompt: Tensor, n_tokens: int) -> None:
        engine.clear()
        ids = prompt.numpy()
        for _ in range(n_tokens):
            ids = engine.logits(ids, last_only=True).argmax(1)

    return Way(generate=generate, nbytes=file.stat().st_size)


def with_lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False))


def fused(model: nn.Module) -> nn.Module:
    pql.fuse_projections(model, in_inference=True)
    return model


def with_rounded_activations(model: PreTrainedModel) -> PreTrainedModel:
    pql.set_activation_bits(model, 8)
    return model


def with_torch_int4(model: PreTrainedModel) -> PreTrainedModel:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], TorchInt4(module))
    return model


def float_folder(shape: str, folder: Path) -> Path:
    """The float model: SmolLM2, or random weights of a billion parameters' shapes with SmolLM2's tokenizer."""
    if shape == "smollm2":
        return Path(demo_model_folder())
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model_folder()).save_pretrained(folder)
    return folder


def ways(shape: str, chosen: list[str] | None, n_threads: int) -> Iterator[tuple[str, Way]]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = float_folder(shape, Path(temporary) / "float")

        def load(dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)

        def ours(nbits: int, dtype: torch.dtype = torch.float32, **options: object) -> PreTrainedModel:
            return load(dtype, quantization_config=pql.HQQConfig(nbits=nbits, group_size=GROUP_SIZE, **options))

        def llama_cpp() -> Way:
            ensure_converter()
            pql.export(ours(4), Path(temporary, "gguf"), "gguf", tokenizer=AutoTokenizer.from_pretrained(folder))
            return of_llama_cpp(Path(temporary, "gguf", "model.gguf"), n_threads)

        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        half = torch.bfloat16
        builders: dict[str, Callable[[], Way]] = {
            "dense float32": lambda: of_transformers(load()),
            "dense bfloat16": lambda: of_transformers(load(half)),
            "dense float32 + LoRA": lambda: of_transformers(with_lora(load())),
            "HQQ 4-bit, float32": lambda: of_transformers(ours(4)),
            "HQQ 4-bit, bfloat16": lambda: of_transformers(ours(4, half)),
            "HQQ 4-bit, bfloat16, fused": lambda: of_transformers(fused(ours(4, half))),
            "HQQ 4-bit, embeddings 8-bit": lambda: of_transformers(ours(4, quantize_embeddings=8)),
            "HQQ 4-bit, activations 8-bit": lambda: of_transformers(with_rounded_activations(ours(4))),
            "HQQ 4-bit, activations 8-bit, bfloat16": lambda: of_transformers(with_rounded_activations(ours(4, half))),
            "HQQ 4-bit, embeddings and activations 8-bit": lambda: of_transformers(
                with_rounded_activations(ours(4, quantize_embeddings=8))
            ),
            "HQQ 3-bit, float32": lambda: of_transformers(ours(3)),
            "HQQ 2-bit, float32": lambda: of_transformers(ours(2)),
            "HQQ 4-bit + LoRA, float32": lambda: of_transformers(with_lora(ours(4))),
            "HQQ 4-bit + LoRA, float32, fused": lambda: of_transformers(fused(with_lora(ours(4)))),
            "torch int4, bfloat16": lambda: of_transformers(with_torch_int4(load(half))),
            "bitsandbytes NF4, float32": lambda: of_transformers(
                load(quantization_config=nf4, device_map={"": "cpu"})
            ),
            "llama.cpp, Q4_1": llama_cpp,
        }
        if unknown := set(chosen or ()) - set(builders):
            raise SystemExit(f"no such ways: {sorted(unknown)}. There are {list(builders)}.")
        for name, build in builders.items():
            if not chosen or name in chosen:
                yield name, build()
                gc.collect()


def profile(model: nn.Module, prompt: Tensor, n_tokens: int, clock: Clock) -> dict[str, float]:
    """Median seconds of a generated token's parts: the compiled kernels, the head, attention, and the rest."""
    spent = dict.fromkeys(("kernels", "head", "attention"), 0.0)

    def timed(part: str, call: Callable) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            start = clock()
            try:
                return call(*args, **kwargs)
            finally:
                spent[part] += clock() - start

        return run

    sdpa, tokens = nn.functional.scaled_dot_product_attention, []
    head = model.get_output_embeddings()
    with torch.no_grad():
        cache = model(input_ids=prompt[None]).past_key_values
        ids = torch.tensor([[1]])
        model(input_ids=ids, past_key_values=cache)  # prepares the products
        layers = [each for each in model.modules() if isinstance(each, pql.QuantizedLinear)]
        products = [each._direct_product._product for each in layers]
        groups = {each.shared_product for each in layers if each.shared_product is not None}
        products += [group.products for group in groups if group.products is not None]
        kernels = [product._function for product in products]
        for product in products:
            product._function = timed("kernels", product._function)
        head.forward = timed("head", head.forward)
        nn.functional.scaled_dot_product_attention = timed("attention", sdpa)
        try:
            for _ in range(n_tokens):
                spent.update(dict.fromkeys(spent, 0.0))
                start = clock()
                ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
                tokens.append(dict(spent) | {"token": clock() - start})
        finally:
            nn.functional.scaled_dot_product_attention = sdpa
            del head.forward
            for product, kernel in zip(products, kernels, strict=True):
                product._function = kernel
    medians = {part: statistics.median(token[part] for token in tokens) for part in tokens[0]}
    return medians | {"rest": medians["token"] - sum(medians[part] for part in spent)}


def measure(found: dict[str, Way], args: argparse.Namespace, clock: Clock, bandwidth: float) -> list[dict]:
    prompt = torch.randint(3, 40_000, (args.prompt,))
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(args.turns + 1):
        for name in random.sample(sorted(found), len(found)):
            times = []
            for n_tokens in (1, 1 + args.new_tokens):
                start = clock()
                found[name].generate(prompt, n_tokens)
                times.append(clock() - start)
            if turn:
                seconds[name].append((times[0], (times[1] - times[0]) / args.new_tokens))
    rows = []
    for name, times in seconds.items():
        of_prompt, of_token = (statistics.median(each) for each in zip(*times, strict=True))
        row = {
            "way": name,
            "prompt_tokens_per_s": args.prompt / of_prompt,
            "tokens_per_s": 1 / of_token,
            "token_s": [token for _, token in times],
            "limit_s": found[name].nbytes / bandwidth,
            "mb": found[name].nbytes / 1e6,
        }
        rows.append(row)
        print(
            f"{name:44} {row['prompt_tokens_per_s']:8.1f} prompt tokens/s, {row['tokens_per_s']:7.2f} generated, "
            f"{1e3 * of_token:.1f} ms a token, limit {1e3 * row['limit_s']:.1f} ms ({row['mb']:.0f} MB)",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["smollm2", "1b"], default="smollm2")
    parser.add_argument("--ways", nargs="+", help="by name; all by default")
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    add_options(parser)
    args = parser.parse_args()
    clock, clock_name = begin(args)
    bandwidth = memory_bandwidth(args.turns, clock)
    found = dict(ways(args.shape, args.ways, torch.get_num_threads()))
    rows = measure(found, args, clock, bandwidth)
    parts = {
        name: profile(way.model, torch.randint(3, 40_000, (args.prompt,)), args.new_tokens, clock)
        for name, way in found.items()
        if name.startswith("HQQ") and isinstance(way.model, PreTrainedModel)
    }
    for name, medians in parts.items():
        print(f"{name}: " + ", ".join(f"{part} {1e3 * value:.2f} ms" for part, value in medians.items()))
    path = RESULTS / f"generate{'' if args.shape == 'smollm2' else '_' + args.shape}{ending(args)}.json"
    device = describe_device() | {"bitsandbytes": version("bitsandbytes"), "xllamacpp": version("xllamacpp")}
    measured = {
        "device": device | {"kernels": kernels_in_use()},
        "command": shlex.join(["python", "benchmarks/bench_generate.py", *sys.argv[1:]]),
        "clock": clock_name,
        "memory_gb_per_s": bandwidth / 1e9,
        "prompt": args.prompt,
        "new_tokens": args.new_tokens,
        "rows": rows,
        "profile": parts,
    }
    path.write_text(json.dumps(measured, indent=2) + "\n")


if __name__ == "__main__":
    main()
