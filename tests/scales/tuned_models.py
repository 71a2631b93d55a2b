"""Quantized tiny models with tuned scales, and what is asked of them."""

import pytest
import torch
from every_method import METHODS, quick_config, quick_spec
from integrations.tiny import tiny_model, token_ids
from peft import PeftModel, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, QuantScalesConfig

CONFIGS = {name: quick_config(name) for name in METHODS}
# By role, the names of the tensors that are trained with it.
TENSORS: dict[str, dict[str, set[str]]] = {name: {"biases": {"bias"}} for name in METHODS}
for name in METHODS:
    for tensor_name, role in quick_spec(name).trainable_roles(64, 64).items():
        TENSORS[name].setdefault(role, set()).add(tensor_name)
ALL = {name: (*TENSORS[name], "norms") for name in METHODS}
# What differs in kind: groups along the outputs.
CONFIGS["hqq-axis0"], ALL["hqq-axis0"] = HQQConfig(nbits=3, group_size=16, axis=0), ALL["hqq"]

every_config = pytest.mark.parametrize("method", CONFIGS)
every_method = pytest.mark.parametrize("method", METHODS)


def _metadata(method: str) -> list[str]:
    """The tensors beside the codes."""
    spec = quick_spec(method)
    return [name for name in spec.tensor_layout(64, 64) if name != spec.codes_name]


def quantized(method: str = "hqq", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model()
    rotary = model.model.rotary_emb.inv_freq
    model.to(dtype)
    model.model.rotary_emb.inv_freq = rotary  # as a model loaded in this dtype has it
    return pql.quantize_model(model, CONFIGS[method], progress=False)


def tuned(base: nn.Module, train: tuple[str, ...] = ("scales",), **fields) -> PeftModel:
    return get_peft_model(base, QuantScalesConfig(train=train, **fields))


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids(), labels=token_ids()).loss


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def train_steps(model: nn.Module, steps: int = 5, lr: float = 1e-2) -> tuple[float, float]:
    """Loss before and after a few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    first = loss_of(model).item()
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return first, loss_of(model).item()


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    for name, tensor in state.items():
        assert now[name].dtype == tensor.dtype, name
        assert torch.equal(now[name], tensor), name


def trained_kinds(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
