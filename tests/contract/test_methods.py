"""What every registered method must keep. A third method is tested by being registered; a toy one shows the cost."""

import copy
import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn

from peft_quantlayers import (
    QuantConfig,
    QuantizedLinear,
    QuantizedWeight,
    QuantMethod,
    QuantScalesConfig,
    QuantSpec,
    TensorLayout,
    quantize_model,
    register_method,
)
from peft_quantlayers.formats import spec as spec_module
from peft_quantlayers.formats.checkpoint import specs_from_json, specs_to_json
from peft_quantlayers.layers import layer_type
from peft_quantlayers.layers import linear as linear_module
from peft_quantlayers.methods import registered_methods, spec_from_dict
from peft_quantlayers.methods import registry as method_module


@dataclass(frozen=True, kw_only=True)
class AbsmaxSpec(QuantSpec):
    """Eight bits and one scale a row: all that a method has to bring."""

    method: ClassVar[str] = "toy_absmax"
    codes_name: ClassVar[str] = "codes"

    def tensor_layout(self, out_features: int, in_features: int) -> dict[str, TensorLayout]:
        return {
            "codes": TensorLayout(shape=(out_features, in_features), dtype=torch.int8, role="codes"),
            "scale": TensorLayout(shape=(out_features, 1), dtype=torch.float32, role="scales"),
        }


class AbsmaxMethod(QuantMethod):
    spec_type = AbsmaxSpec

    def quantize(
        self,
        weight: Tensor,
        spec: QuantSpec,
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
SHAPE = (16, 64)


@pytest.fixture(autouse=True)
def _toy_method(monkeypatch) -> None:
    registered_methods()
    monkeypatch.setattr(method_module, "_methods", dict(method_module._methods))
    monkeypatch.setattr(linear_module, "_layer_types", dict(linear_module._layer_types))
    register_method(AbsmaxMethod())


@pytest.fixture(params=METHODS)
def method(request, _toy_method) -> QuantMethod:
    return registered_methods()[request.param]


@pytest.fixture
def spec(method) -> QuantSpec:
    return method.spec_type()


def random_weight(dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.05 * torch.randn(SHAPE)).to(dtype)


def test_the_default_spec_survives_json(method, spec):
    fields = json.loads(json.dumps(spec.to_dict()))
    assert fields["method"] == method.spec_type.method
    assert spec_from_dict(fields) == spec
    stored = json.loads(json.dumps(specs_to_json({"layer": spec})))
    assert specs_from_json(stored, spec_from_dict) == {"layer": spec}
    with pytest.raises(ValueError, match="unknown field"):
        spec_from_dict(fields | {"surprise": 1})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantizing_keeps_the_layout_and_the_weight(method, spec, dtype):
    weight = random_weight(dtype)
    before = weight.clone()
    quantized = method.quantize(weight, spec)
    quantized.check("layer")
    assert (quantized.out_features, quantized.in_features) == SHAPE
    assert spec.codes_name in quantized.tensors
    assert not quantized.tensors[spec.codes_name].is_floating_point()
    layout = quantized.spec.tensor_layout(*SHAPE)
    assert [name for name, entry in layout.items() if entry.role == "codes"] == [spec.codes_name]
    nbytes = sum(tensor.nbytes for tensor in quantized.tensors.values())
    assert quantized.bits_per_weight == 8 * nbytes / weight.numel()
    assert torch.equal(weight, before)
    again = method.quantize(weight, spec)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in quantized.tensors.items())


def test_a_weight_that_lies_transposed_in_memory_gets_the_same_codes(method, spec):
    weight = random_weight()
    transposed = weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    expected = method.quantize(weight, spec)
    found = method.quantize(transposed, spec)
    assert all(torch.equal(tensor, found.tensors[name]) for name, tensor in expected.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantizing_gives_shape_dtype_and_about_the_weight(method, spec, dtype):
    weight = random_weight()
    quantized = method.quantize(weight, spec)
    dense = method.dequantize(quantized, dtype=dtype)
    assert dense.shape == SHAPE
    assert dense.dtype == dtype
    assert (dense.float() - weight).norm() < 0.5 * weight.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_are_the_rows_of_the_dequantized_weight(method, spec, dtype, set_tile_elements):
    set_tile_elements(6 * SHAPE[1])
    quantized = method.quantize(random_weight(), spec)
    dense = method.dequantize(quantized, dtype=dtype)
    tiles = method.weight_tiles(quantized, dtype=dtype)
    found = [(range(SHAPE[0])[rows], tile.clone()) for rows, tile in tiles]
    assert [row for rows, _ in found for row in rows] == list(range(SHAPE[0]))
    assert torch.equal(torch.cat([tile for _, tile in found]), dense)


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_product_with_the_dequantized_weight(method, spec, bias, lead):
    quantized = method.quantize(random_weight(), spec)
    dense = method.dequantize(quantized)
    bias = torch.randn(SHAPE[0]) if bias else None
    x = torch.randn(*lead, SHAPE[1])
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = method.linear(x1, quantized, bias)
    expected = F.linear(x2, dense, bias)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(x1.grad, x2.grad)
    half = method.linear(x.bfloat16(), quantized, bias)
    assert half.dtype == torch.bfloat16
    assert half.shape == expected.shape


def test_a_quantized_weight_is_its_own_best_successor(method, spec):
    first = method.quantize(random_weight(), spec)
    dense = method.dequantize(first)
    second = method.quantize(dense, first.spec, start=first)
    again = method.dequantize(second)
    torch.testing.assert_close(again, dense, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(method, spec, bad):
    weight = random_weight()
    weight[3, 3] = bad
    with pytest.raises(ValueError, match=r"model\.q_proj"):
        QuantizedLinear.from_weight(weight, None, spec, layer_name="model.q_proj")


def test_a_layer_holds_writes_and_comes_back_from_its_state(method, spec):
    layer = QuantizedLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[0]), spec, layer_name="model.q_proj")
    assert type(layer) is layer_type(spec.method)
    x = torch.randn(2, SHAPE[1])
    torch.testing.assert_close(layer(x), F.linear(x, layer.dequantize(), layer.bias))
    assert sum(p.numel() for p in layer.parameters()) == SHAPE[0] * SHAPE[1] + SHAPE[0]

    written = random_weight()
    layer.weight.data.copy_(written)
    expected = method.quantize(written, spec)
    assert all(torch.equal(layer.get_parameter(name), tensor) for name, tensor in expected.tensors.items())

    empty = QuantizedLinear.empty(
        layer.spec, out_features=SHAPE[0], in_features=SHAPE[1], bias=True, compute_dtype=torch.float32, device="cpu"
    )
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    codes = layer.codes.detach().clone()
    layer.to(torch.bfloat16)
    assert layer.compute_dtype == torch.bfloat16
    assert torch.equal(layer.codes, codes)


def test_tensors_with_a_role_train_as_a_peft_method_and_merge_without_loss(method, spec):
    roles = spec.trainable_roles(*SHAPE)
    assert roles
    assert set(roles.values()) <= set(spec_module.METADATA_ROLES)
    assert spec.codes_name not in roles
    layer = QuantizedLinear.from_linear(nn.Linear(SHAPE[1], SHAPE[0]), spec, layer_name="0")
    codes, x, wanted = layer.codes.clone(), torch.randn(8, SHAPE[1]), torch.randn(8, SHAPE[0])
    config = QuantScalesConfig(target_modules=["0"], train=tuple(roles.values()))
    model = get_peft_model(nn.Sequential(layer), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == len(roles)
    optimizer = torch.optim.Adam(trained, lr=1e-4)
    losses = []
    for _ in range(5):
        loss = (model(x) - wanted).square().mean()
        loss.backward()
        assert all(parameter.grad.abs().max() > 0 for parameter in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = model(x)
    merged = model.merge_and_unload()[0]
    assert merged is layer
    assert torch.equal(merged(x), expected)
    assert torch.equal(merged.codes, codes)
    merged.quantized_weight.check("0")


def test_a_method_quantizes_whole_models_by_a_config_of_two_lines():
    @dataclass(frozen=True, kw_only=True)
    class AbsmaxConfig(QuantConfig, AbsmaxSpec):
        spec_type: ClassVar[type[QuantSpec]] = AbsmaxSpec

    model = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 8))
    x = torch.randn(4, 64)
    expected = model(x)
    quantize_model(model, AbsmaxConfig(skip_modules=["2"]), progress=False)
    assert [type(module).__name__ for module in model] == ["TOY_ABSMAXLinear", "ReLU", "Linear"]
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.02)
    assert set(model.state_dict()) == {"0.codes", "0.scale", "0.bias", "2.weight", "2.bias"}


def test_a_class_is_made_for_a_method_that_brings_none():
    toy = layer_type("toy_absmax")
    assert toy is layer_type("toy_absmax")
    assert issubclass(toy, QuantizedLinear)
    with pytest.raises(ValueError, match="unknown quantization method"):
        layer_type("no_such_method")
