"""Memory and seconds of a LoRA step on the experts of a mixture, and of loading it: ours, PEFT on dense experts.

A synthetic checkpoint with the layer shapes of Qwen3-30B-A3B (128 experts of 768, 8 for each token; a small
vocabulary) is written once. Every variant runs in a process of its own: it loads the checkpoint, ours quantizing it
meanwhile, and does steps of forward and backward with ``--tokens`` tokens. LoRA of rank 8 lies on both weights of all
experts, by PEFT's own ``target_parameters``. "Dense, without LoRA" is the forward and backward pass of the dense model
without any adapter. Seconds are those of the CPU, so that another program beside it does not count. Memory is the rise
of what is no mapped file while loading, and of the resident set above the loaded model in a step.

``--only`` measures some variants again, and keeps the others' rows in the result file.

Before anything is timed, ours is compared with PEFT on dense experts of the same values, on a small model.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _device import describe_device
from _memory import MIB, extra_memory_of, in_own_process, peak_of_anonymous, resident_bytes
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import peft_quantlayers as pql

FILE = Path(__file__).parent / "results" / "experts.json"
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
RANK = 8
# Forward and backward in bfloat16, against the same adapter on dense experts.
TOLERANCE = 1e-3

VARIANTS = {
    "HQQ 4-bit, LoRA": {"bits": 4, "lora": True},
    "HQQ 4-bit, LoRA, checkpointing": {"bits": 4, "lora": True, "checkpointing": True},
    "HQQ 2-bit, LoRA": {"bits": 2, "lora": True},
    "PEFT on dense experts": {"lora": True},
    "PEFT on dense experts, checkpointing": {"lora": True, "checkpointing": True},
    "dense, without LoRA": {},
}


def config_of(*, n_layers: int, n_experts: int = 128, hidden: int = 2048, width: int = 768) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        hidden_size=hidden,
        moe_intermediate_size=width,
        intermediate_size=3 * hidden,
        num_hidden_layers=n_layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        head_dim=128 if hidden == 2048 else 32,
        num_experts=n_experts,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        vocab_size=4096,
    )


def write_checkpoint(folder: Path, n_layers: int) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = Qwen3MoeForCausalLM(config_of(n_layers=n_layers))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder, max_shard_size="500MB")


def with_adapter(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    lora = LoraConfig(r=RANK, target_modules=[], target_parameters=TARGETS, init_lora_weights=False)
    return get_peft_model(model, lora).train()


def step(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Forward and backward; without an adapter the gradient goes to the embeddings' output."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=x, labels=ids, use_cache=False).loss
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return float(loss.detach())


def check() -> float:
    """The largest relative difference of the loss and of the adapter's gradients from PEFT's on dense experts."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config_of(n_layers=1, n_experts=16, hidden=256, width=64))
    pql.quantize_model(model, pql.HQQConfig(nbits=4), progress=False)
    ids = torch.randint(0, 4096, (1, 64))
    found = []
    for dense in (False, True):
        adapted = with_adapter(pql.dequantize_model(model) if dense else model)
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.flatten() for n, p in adapted.named_parameters() if p.grad is not None and ".lora_" in n]
        found.append((float(loss.detach()), torch.cat(grads)))
        model = adapted.unload()
    (loss, grads), (wanted, wanted_grads) = found
    return max(abs(loss / wanted - 1), float((grads - wanted_grads).norm() / wanted_grads.norm()))


def measure(folder: str, variant: str, n_tokens: int, repeats: int) -> dict[str, Any]:
    options: dict[str, Any] = VARIANTS[variant]
    found: dict[str, Any] = {}
    models: list[torch.nn.Module] = []

    def load() -> None:
        quantized = {"quantization_config": pql.HQQConfig(nbits=options["bits"])} if "bits" in options else {}
        models.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **quantized))

    start = time.process_time()
    found["load_peak_mib"] = peak_of_anonymous(load)
    found["load_cpu_seconds"] = time.process_time() - start
    model = models[0].train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found["model_mib"] = sum(parameter.nbytes for parameter in model.parameters()) / MIB
    if options.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.get("lora"):
        model = with_adapter(model)
    ids = torch.randint(0, 4096, (1, n_tokens), generator=torch.Generator().manual_seed(1))
    first = extra_memory_of(lambda: step(model, ids))
    found["step_peak_mib"] = first["extra_peak_mib"]
    seconds, cpu_seconds = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        step(model, ids)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    found["step_seconds"], found["step_cpu_seconds"] = statistics.median(seconds), statistics.median(cpu_seconds)
    found["resident_mib"] = resident_bytes("VmRSS") / MIB
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    parser.add_argument("--folder", help="where the checkpoint is, or is written; a temporary folder by default")
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.variant:
        print(json.dumps(measure(options.folder, options.variant, options.tokens, options.repeats)))
        return
    difference = check()
    if difference > TOLERANCE:
        raise SystemExit(f"ours differs from PEFT on dense experts by {difference:.1e}; nothing was timed.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        if not (folder / "config.json").exists():
            write_checkpoint(folder, options.layers)
        rows = {}
        for variant in options.only:
            arguments = ["--folder", str(folder), "--variant", variant, "--tokens", str(options.tokens)]
            arguments += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
            rows[variant] = json.loads(in_own_process(*arguments))
            print(variant, json.dumps({name: round(value, 2) for name, value in rows[variant].items()}), flush=True)
    before = json.loads(FILE.read_text())["variants"] if FILE.exists() else {}
    result = {
        "device": describe_device(),
        "command": f"python benchmarks/bench_experts.py --threads {options.threads} --repeats {options.repeats}",
        "layers": options.layers,
        "tokens": options.tokens,
        "difference": difference,
        "variants": {name: rows.get(name) or before[name] for name in VARIANTS if name in rows or name in before},
    }
    FILE.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
