"""Every registered method with settings that are quick on tiny layers, and a toy one, for tests of all methods.

A method is found by being registered; nothing is listed here by hand.
"""

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_quantlayers import QuantConfig, QuantizedWeight, QuantMethod, QuantSpec, TensorLayout, register_method
from peft_quantlayers.layers import linear as linear_module
from peft_quantlayers.methods import config_type, registered_methods, registry

# Where a spec has one of these fields, the quick value is used.
QUICK: dict[str, Any] = {"nbits_per_codebook": 4, "rounds": 1, "group_size": 16, "block_size": 16}


@dataclass(frozen=True, kw_only=True)
class AbsmaxSpec(QuantSpec):
    """Eight bits and one scale a row: all that a method has to bring."""

    method = "toy_absmax"

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "codes": TensorLayout(shape=(out_features, in_features), dtype=torch.int8, role="codes"),
            "scale": TensorLayout(shape=(out_features, 1), dtype=torch.float32, role="scales"),
        }

    max_code = 254

    def unpack_codes(self, codes: Tensor, in_features: int) -> Tensor:
        return codes.short() + 127

    def pack_codes(self, codes: Tensor) -> Tensor:
        return (codes - 127).to(torch.int8)


class AbsmaxMethod(QuantMethod[AbsmaxSpec]):
    spec_type = AbsmaxSpec

    def quantize(
        self,
        weight: Tensor,
        spec: AbsmaxSpec,
        *,
        hessian: Tensor | None = None,
        start: QuantizedWeight | None = None,
        iterations: int | None = None,
    ) -> QuantizedWeight:
        weight = weight.detach().float()
        if not torch.isfinite(weight).all():
            raise ValueError("the weight holds NaN or Inf.")
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        tensors = {"codes": (weight / scale).round().to(torch.int8), "scale": scale}
        return QuantizedWeight(spec=spec, out_features=weight.shape[0], in_features=weight.shape[1], tensors=tensors)

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return (weight.tensors["codes"] * weight.tensors["scale"]).to(dtype)


METHODS = sorted({*registered_methods(), "toy_absmax"})
all_methods = pytest.mark.parametrize("method_name", METHODS)


@pytest.fixture
def toy_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy method registered, for the length of a test."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    monkeypatch.setattr(linear_module, "_layer_types", dict(linear_module._layer_types))
    register_method(AbsmaxMethod())


def quick_config(method_name: str, **changed: Any) -> QuantConfig:
    """The method's config with quick settings."""
    made = config_type(registered_methods()[method_name].spec_type)
    known = {field.name for field in fields(made)}
    return made(**{name: value for name, value in QUICK.items() if name in known}, **changed)


def quick_spec(method_name: str) -> QuantSpec:
    """The method's spec with quick settings."""
    return quick_config(method_name).spec_for("layer")
