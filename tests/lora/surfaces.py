"""Quantized models and their dense twins for the tests of PEFT's features: the same weights, the same seeds."""

import copy
from collections.abc import Callable
from functools import cache

import torch
from every_method import quick_config
from integrations.tiny import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import peft_quantlayers as pql
from peft_quantlayers import QuantizedLinear, QuantizedWeight


class Two(nn.Module):
    """Two biased linears with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 96)
        self.second = nn.Linear(96, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@cache
def _quantized(kind: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    model = Two() if kind == "two" else tiny_model(kind)
    return pql.quantize_model(model, quick_config(method), progress=False)


def quantized(method: str, kind: str = "two") -> nn.Module:
    """A fresh quantized model: :class:`Two`, or a tiny transformers model of the family ``kind``."""
    return copy.deepcopy(_quantized(kind, method))


def dense_twin(method: str, kind: str = "two") -> nn.Module:
    """The same model with its dequantized weights in plain linears."""
    return pql.dequantize_model(quantized(method, kind))


def adapted(model: nn.Module, make_config: Callable[[], LoraConfig]) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(model, make_config())


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def assert_same_gradient(found: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32's sums in another order, which is that of their largest numbers."""
    atol = 1e-5 + 2e-6 * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def assert_same_adapters(ours: nn.Module, reference: nn.Module) -> None:
    found = {name: tensor for name, tensor in ours.state_dict().items() if "lora_" in name}
    expected = {name: tensor for name, tensor in reference.state_dict().items() if "lora_" in name}
    assert found.keys() == expected.keys()
    assert found
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


def assert_requantized(ours: nn.Module, reference: nn.Module) -> None:
    """Every base weight of ``ours`` stands for the float one that PEFT leaves on the dense twin.

    A merged one is the unmerged weight with the delta in its codes, or quantized from scratch; one that was written
    (PiSSA) is quantized from scratch.
    """
    layers, dense = lora_layers(ours), lora_layers(reference)
    assert layers.keys() == dense.keys()
    for name, layer in layers.items():
        base = layer.get_base_layer()
        target = dense[name].get_base_layer().weight.detach()
        candidates = [base.method.quantize(target, base.spec)]
        if layer.merging.unmerged is not None:
            delta = target - dense_form(base, layer.merging.unmerged.weight)
            candidates.append(base.method.merged(layer.merging.unmerged.weight, lambda rows, d=delta: d[rows]))
        # Codes on the edge between two may fall either way, since float rounding differs in the last bit, and k-means
        # ends elsewhere then: as near to the target is as good.
        found = base.dequantize(torch.float32)
        rebuilt = [dense_form(base, each) for each in candidates]
        assert any(
            (found - each).norm() <= 1e-3 * target.norm()
            or abs((found - target).norm() / (each - target).norm() - 1) < 0.05
            for each in rebuilt
        ), name


def dense_form(base: QuantizedLinear, weight: QuantizedWeight) -> Tensor:
    return base.method.dequantize(weight)
