"""Loss curves of one process, of DDP and of FSDP2 over two (gloo): equal to rounding. Writes the plot in docs.

    python benchmarks/distributed_losses.py

A tiny random Llama, quantized by each method, learns the same batches each time; of two processes each reads half of
every batch. Needs matplotlib for the plot (the extra ``report``).
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import peft_quantlayers as pql

CONFIGS = {
    "hqq": pql.HQQConfig(nbits=3, group_size=16),
    "aqlm": pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=9, rounds=0),
}
WAYS = ("one process", "DDP", "FSDP2")
WORLD_SIZE = 2
BATCH, LENGTH, VOCABULARY = 4, 24, 64
RESULTS = Path(__file__).parent / "results" / "distributed_losses.json"
PLOT = Path(__file__).parents[1] / "docs" / "distributed_losses.svg"


def save_models(folder: Path) -> None:
    """A quantized model for each method, in a folder of its name."""
    for method, config in CONFIGS.items():
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, pad_token_id=0, **sizes))
        pql.save_model(pql.quantize_model(model, config, progress=False), folder / method)


def batches(n_steps: int) -> Tensor:
    """Counting from a random start, so that there is something to learn: (n_steps, BATCH, LENGTH)."""
    starts = torch.randint(0, VOCABULARY, (n_steps, BATCH, 1), generator=torch.Generator().manual_seed(2))
    return 3 + (starts + torch.arange(LENGTH)) % (VOCABULARY - 3)


def loss_curve(folder: Path, way: str, n_steps: int, *, rank: int = 0, world_size: int = 1) -> list[float]:
    """The loss of each step, over the whole batch.

    Args:
        folder: of a quantized model.
        way: one of ``WAYS``; all but the first in a process group.
        n_steps: of the optimizer.
        rank, world_size: of this process; it reads every ``world_size``-th text of a batch.
    """
    sharded = {"distributed_config": DistributedConfig(fsdp_size=world_size)} if way == "FSDP2" else {}
    base = AutoModelForCausalLM.from_pretrained(folder, **sharded)
    torch.manual_seed(1)
    model: nn.Module = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if way == "DDP":
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for ids in batches(n_steps):
        own = ids[rank::world_size]
        loss = model(input_ids=own, labels=own).loss
        loss.backward()
        if way == "FSDP2":  # the adapter is not sharded: every process has a copy
            for parameter in trained:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size
        total = loss.detach().clone()
        if world_size > 1:
            dist.all_reduce(total)
        found.append(float(total) / world_size)
        optimizer.step()
        optimizer.zero_grad()
    return found


def _in_process(rank: int, port: int, folder: str, n_steps: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ["WORLD_SIZE"] = str(WORLD_SIZE)
    dist.init_process_group("gloo")
    curves = {
        method: {
            way: loss_curve(Path(folder, method), way, n_steps, rank=rank, world_size=WORLD_SIZE) for way in WAYS[1:]
        }
        for method in CONFIGS
    }
    if rank == 0:
        Path(folder, "curves.json").write_text(json.dumps(curves))
    dist.destroy_process_group()


def main(n_steps: int = 60) -> None:
    """Measure, compare, write results and plot."""
    from peft_quantlayers.report.svg_plots import curves as drawn
    from peft_quantlayers.report.svg_plots import svg

    with tempfile.TemporaryDirectory() as scratch:
        save_models(Path(scratch))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        mp.start_processes(_in_process, args=(port, scratch, n_steps), nprocs=WORLD_SIZE, start_method="spawn")
        curves = json.loads(Path(scratch, "curves.json").read_text())
        for method in CONFIGS:
            curves[method] = {WAYS[0]: loss_curve(Path(scratch, method), WAYS[0], n_steps), **curves[method]}
    one = {method: torch.tensor(each[WAYS[0]]) for method, each in curves.items()}
    apart = {
        f"{method} {way}": float(((torch.tensor(losses) - one[method]) / one[method]).abs().max())
        for method, each in curves.items()
        for way, losses in each.items()
        if way != WAYS[0]
    }
    RESULTS.write_text(json.dumps({"largest_relative_difference": apart, "losses": curves}, indent=1) + "\n")
    lines = {
        f"{method}, {way}": list(enumerate(losses, 1))
        for method, each in curves.items()
        for way, losses in each.items()
    }
    PLOT.write_text(svg(drawn(lines, label="loss")) + "\n")
    print(json.dumps(apart, indent=1))


if __name__ == "__main__":
    main()
