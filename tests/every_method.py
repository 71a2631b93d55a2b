"""Every registered method with settings that are quick on tiny layers, and a toy one, for tests of all methods.

A method is found by being registered; nothing is listed here by hand. Tests over ``METHODS`` use the fixture
``toy_method``, which registers the toy one.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_quantlayers import QuantConfig, QuantizedWeight, QuantMethod, QuantSpec, TensorLayout
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


TOY = AbsmaxMethod()
_ALL = registered_methods() | {AbsmaxSpec.method: TOY}
METHODS = sorted(_ALL)


def register_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the toy method until ``monkeypatch`` is undone."""
    monkeypatch.setattr(registry, "_methods", dict(registry._methods) | {AbsmaxSpec.method: TOY})


def all_methods(test: Callable) -> Callable:
    """Run a test once for each method; its argument ``method`` is the name."""
    return pytest.mark.usefixtures("toy_method")(pytest.mark.parametrize("method", METHODS)(test))


def quick_config(method: str, **changed: Any) -> QuantConfig:
    """The method's config with quick settings."""
    made = config_type(_ALL[method].spec_type)
    known = {field.name for field in fields(made)}
    return made(**{name: value for name, value in QUICK.items() if name in known}, **changed)


def quick_spec(method: str) -> QuantSpec:
    """The method's spec with quick settings."""
    return quick_config(method).spec_for("layer")


def methods_for(strategy: str) -> list[str]:
    """The methods whose weights adapters of the right kind can be merged into by ``strategy``."""
    return [name for name in METHODS if _can_merge_by(strategy, _ALL[name], quick_spec(name))]


def _can_merge_by(strategy: str, method: QuantMethod, spec: QuantSpec) -> bool:
    if strategy == "calibrated":
        return method.can_use_hessian(spec)
    try:
        if strategy == "exact":  # by QA-LoRA
            method.group_delta_size(spec, in_features=64)
        elif strategy == "append":
            spec.extended()
    except NotImplementedError:
        return False
    return True
