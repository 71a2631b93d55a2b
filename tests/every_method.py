"""Every registered method with settings that are quick on tiny layers, and a toy one, for tests of all methods.

A method is found by being registered; nothing is listed here by hand. Tests over ``METHODS`` use the fixture
``toy_method``, which registers the toy one. ``VARIANTS`` are the methods, and each of their specs that stores a weight
in another way.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_quantlayers import QuantConfig, QuantizedWeight, QuantMethod, QuantSpec, TensorLayout
from peft_quantlayers.methods import config_type, registered_methods, registry

# Where a spec has one of these fields, the quick value is used.
QUICK: dict[str, Any] = {"nbits_per_codebook": 4, "rounds": 1}
# Weights of these shapes can be stored by every quick spec: an integer field that does not divide them, such as the
# size of a group, gets one of these values.
SHAPES = ((16, 32), (16, 48), (16, 64))
DIVISORS = (16, 8, 4, 2, 1)


SCALE_STEP = 2.0**-20


@dataclass(frozen=True, kw_only=True)
class AbsmaxSpec(QuantSpec):
    """Eight bits and one scale a row: all that a method has to bring.

    Fields:
        integer_scale: store the scales as multiples of ``SCALE_STEP``, so that no tensor is floating.
    """

    method = "toy_absmax"

    integer_scale: bool = False

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        dtype = torch.int32 if self.integer_scale else torch.float32
        return {
            "codes": TensorLayout(shape=(out_features, in_features), dtype=torch.int8, role="codes"),
            "scale": TensorLayout(shape=(out_features, 1), dtype=dtype, role="scales"),
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
        if spec.integer_scale:
            scale = (scale / SCALE_STEP).round().clamp(1, 2**31 - 1).int()
        codes = (weight / _steps(scale)).round().clamp(-127, 127).to(torch.int8)
        tensors = {"codes": codes, "scale": scale}
        return QuantizedWeight(spec=spec, out_features=weight.shape[0], in_features=weight.shape[1], tensors=tensors)

    def dequantize(self, weight: QuantizedWeight, *, dtype: torch.dtype = torch.float32) -> Tensor:
        return (weight.tensors["codes"] * _steps(weight.tensors["scale"])).to(dtype)


def _steps(scale: Tensor) -> Tensor:
    return scale if scale.is_floating_point() else scale * SCALE_STEP


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
    spec_type = _ALL[method].spec_type
    quick = _quick_fields(method)
    return config_type(spec_type)(**quick | _divisors(spec_type(**quick)) | changed)


def config_with_default_groups(method: str) -> QuantConfig:
    """The method's config with quick settings but the size of groups, which weights of other shapes do not fit."""
    return config_type(_ALL[method].spec_type)(**_quick_fields(method))


def _quick_fields(method: str) -> dict[str, Any]:
    known = {field.name for field in fields(_ALL[method].spec_type)}
    return {name: value for name, value in QUICK.items() if name in known}


def _divisors(spec: QuantSpec) -> dict[str, int]:
    """The integer field of ``spec`` to change, and its value, so that weights of ``SHAPES`` can be stored."""
    if _can_store_all(spec):
        return {}
    for field in fields(spec):
        for divisor in DIVISORS if type(getattr(spec, field.name)) is int else ():
            try:
                if _can_store_all(replace(spec, **{field.name: divisor})):
                    return {field.name: divisor}
            except (TypeError, ValueError):
                continue  # a value that this field does not have
    raise ValueError(f"no integer field of {spec} makes weights of {SHAPES} fit: say in QUICK which values do.")


def _can_store_all(spec: QuantSpec) -> bool:
    return not any(spec.misfit(*shape) for shape in SHAPES)


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


def _variants(method: str) -> dict[str, QuantConfig]:
    """The method's quick config, and those with one flag turned, or the rows in parts, that store a weight in other
    tensors or roles."""

    def stored(config: QuantConfig) -> object:
        spec = config.spec_for("layer")
        return spec.tensor_layout(*SHAPES[0]), spec.trainable_roles(*SHAPES[0])

    flags = [field for field in fields(_ALL[method].spec_type) if isinstance(field.default, bool)]
    plain = quick_config(method)
    turned = {f"{method}-{flag.name}": quick_config(method, **{flag.name: not flag.default}) for flag in flags}
    if any(field.name == "row_parts" for field in fields(plain)):
        turned[f"{method}-row_parts"] = quick_config(method, row_parts=2)
    return {method: plain} | {name: config for name, config in turned.items() if stored(config) != stored(plain)}


VARIANTS: dict[str, QuantConfig] = {name: config for method in METHODS for name, config in _variants(method).items()}
