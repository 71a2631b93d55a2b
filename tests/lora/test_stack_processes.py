"""Adapters on quantized experts in two processes: DDP averages their gradients, and FSDP2 shards the stacks."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mixtures import codes, same, tiny_mixture
from peft import LoraConfig, get_peft_model
from processes import WORLD_SIZE, in_processes, needs_gloo, run_file
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed.configuration_utils import DistributedConfig

import peft_quantlayers as pql
from peft_quantlayers.layers.quantized_layers import quantized_stacks

FAMILIES = ["qwen3_moe", "gpt_oss", "llama4", "deepseek_v3"]
CONFIGS = {  # By hand: codes of one byte and of two.
    "hqq": pql.HQQConfig(nbits=4, group_size=16),
    "aqlm": pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=9, in_group_size=4, rounds=0, beam=1),
}
IDS = torch.randint(3, 128, (WORLD_SIZE, 24), generator=torch.Generator().manual_seed(3))


def adapted(model: nn.Module) -> nn.Module:
    """With an adapter on attention and experts whose B is no longer zero; the same in all processes."""
    config = LoraConfig(
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        r=2,
        lora_alpha=8,
    )
    torch.manual_seed(1)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.1)
    return peft_model


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained(model: nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapter after a few steps of plain SGD on ``ids``."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.5)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): p.detach().clone() for name, p in trainable(model).items()}


def check_ddp(rank: int, family: str, method: str) -> None:
    model = pql.quantize_model(tiny_mixture(family), CONFIGS[method], progress=False)
    before, fresh = codes(model), copy.deepcopy(model)
    expected = trained(adapted(copy.deepcopy(model)), IDS)
    adapted_model = adapted(model)
    found = trained(nn.parallel.DistributedDataParallel(adapted_model), IDS[rank : rank + 1])
    assert expected.keys() == found.keys()
    start = {name: p.detach() for name, p in trainable(adapted(fresh)).items()}
    assert not any(torch.equal(parameter, start[name]) for name, parameter in found.items())
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], atol=2e-5, rtol=2e-5, msg=name)
    assert same(codes(adapted_model.unload()), before)


def check_fsdp2(rank: int, folder: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=WORLD_SIZE))
    stacks = quantized_stacks(model)
    assert stacks.keys() == quantized_stacks(reference).keys()
    assert all(isinstance(stack.codes, DTensor) for stack in stacks.values())
    expected, found = trained(adapted(reference), IDS), trained(adapted(model), IDS)
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, expected[name], atol=1e-6, rtol=1e-6, msg=name)
    with pytest.raises(ValueError, match=r"sharded over processes.*in one process"):
        next(iter(stacks.values())).write_expert(0, torch.zeros(1))


def run(rank: int, folder: str) -> None:
    for saved in sorted(Path(folder).iterdir()):
        check_ddp(rank, *saved.name.split("-"))
        check_fsdp2(rank, saved)
        dist.barrier()


@needs_gloo
def test_adapters_on_experts_train_in_two_processes_as_in_one(tmp_path):
    for family in FAMILIES:
        for method in CONFIGS if family == "qwen3_moe" else ["hqq"]:
            model = pql.quantize_model(tiny_mixture(family), CONFIGS[method], progress=False)
            pql.save_model(model, tmp_path / f"{family}-{method}")
    run_file(__file__, tmp_path)


if __name__ == "__main__":
    in_processes(run)
