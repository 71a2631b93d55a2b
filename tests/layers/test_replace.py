"""Which modules of a model a config means, and that a refused call leaves every bit of it."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_quantlayers import (
    AQLMConfig,
    HQQConfig,
    HQQLinear,
    HQQSpec,
    dequantize_model,
    quantize_model,
    quantized_modules,
)
from peft_quantlayers.layers import QuantizedLinear, quantizable_modules, quantize_module


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.down_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32)
        self.conv = Conv1D(48, 32)
        self.back = Conv1D(32, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.back(self.conv(self.down_proj(self.q_proj(x)).relu()))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 32)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


class Model(nn.Module):
    """Laid out like a transformers model: a body under ``base_model_prefix``, and a head."""

    base_model_prefix = "model"

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = Body()
        self.lm_head = nn.Linear(32, 20, bias=False)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)
        if tied:
            self.lm_head.weight = self.model.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.model(ids))


BLOCK = ["q_proj", "down_proj", "conv", "back"]
ALL = [f"model.layers.{index}.{name}" for index in range(2) for name in BLOCK]
CONFIG = HQQConfig(nbits=4, group_size=16)
IDS = torch.arange(12).view(2, 6)


def quantize(model: nn.Module, config: HQQConfig = CONFIG) -> nn.Module:
    return quantize_model(model, config, progress=False)


def test_every_linear_and_conv1d_but_the_head_is_quantized_in_place():
    model = Model()
    assert list(quantizable_modules(model, CONFIG)) == ALL
    assert quantize(model) is model
    assert list(quantized_modules(model)) == ALL
    assert all(type(layer) is HQQLinear for layer in quantized_modules(model).values())
    assert [layer.layer_name for layer in quantized_modules(model).values()] == ALL
    assert type(model.lm_head) is nn.Linear
    assert torch.isfinite(model(IDS)).all()


def test_looking_changes_nothing():
    model = Model()
    before = copy.deepcopy(model.state_dict())
    quantizable_modules(model, CONFIG)
    assert_unchanged(model, before)


def test_a_quantized_model_gives_the_outputs_of_its_dequantized_dense_form():
    model = quantize(Model())
    weights = {name: layer.dequantize() for name, layer in quantized_modules(model).items()}
    y = model(IDS)
    assert dequantize_model(model) is model
    assert not quantized_modules(model)
    for name, weight in weights.items():
        module = model.get_submodule(name)
        assert type(module) is type(Model().get_submodule(name))
        assert torch.equal(module.weight.t() if type(module) is Conv1D else module.weight, weight)
    torch.testing.assert_close(model(IDS), y)


def test_a_conv1d_becomes_a_linear_with_its_weight_transposed_and_its_bias():
    model = Model()
    conv = model.model.layers[0].conv
    quantize(model)
    layer = model.model.layers[0].conv
    assert (layer.out_features, layer.in_features) == (48, 32)
    assert torch.equal(layer.bias, conv.bias)
    expected = HQQLinear.from_linear(_linear(conv.weight.t(), conv.bias), layer.spec)
    assert torch.equal(layer.W_q, expected.W_q)
    dense = Conv1D(48, 32)
    dense.weight, dense.bias = nn.Parameter(layer.dequantize().t()), conv.bias
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(layer(x), dense(x))


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight.contiguous()), bias
    return linear


def test_dequantizing_to_a_dtype_gives_weights_of_it():
    model = dequantize_model(quantize(Model()), torch.float16)
    assert model.model.layers[0].q_proj.weight.dtype == torch.float16


def test_codebooks_too_large_for_their_layer_are_told_with_their_bits_and_a_fitting_scheme(caplog):
    def quantized_layer(**fields) -> QuantizedLinear:
        model = nn.Sequential(nn.Linear(576, 576, bias=False))
        quantize(model, AQLMConfig(rounds=0, **fields))
        return quantized_modules(model)["0"]

    # 65,536 entries of 8 float16 are 25 bits for each of 331,776 weights.
    layer = quantized_layer(num_codebooks=1, nbits_per_codebook=16)
    assert layer.bits_per_weight == pytest.approx(2 + 2**16 * 8 * 16 / 576**2 + 16 / 576)
    assert "27.3 bits per weight, of which codes are 2.0" in caplog.text
    assert "use num_codebooks=2, nbits_per_codebook=8" in caplog.text
    caplog.clear()
    assert quantized_layer(num_codebooks=2, nbits_per_codebook=8).bits_per_weight < 2.3
    assert caplog.text == ""


def test_skipped_modules_and_overrides_follow_their_patterns():
    config = HQQConfig(
        nbits=3,
        group_size=16,
        skip_modules=["layers.1", "back"],
        overrides={"down_proj": {"nbits": 8, "group_size": 8}},
    )
    model = quantize(Model(), config)
    layers = quantized_modules(model)
    assert list(layers) == ["model.layers.0.q_proj", "model.layers.0.down_proj", "model.layers.0.conv"]
    assert layers["model.layers.0.down_proj"].spec == HQQSpec(nbits=8, group_size=8)
    assert layers["model.layers.0.q_proj"].spec == HQQSpec(nbits=3, group_size=16)


def test_the_head_is_quantized_on_request_unless_it_is_tied():
    config = HQQConfig(nbits=4, group_size=16, quantize_lm_head=True)
    assert list(quantizable_modules(Model(), config)) == [*ALL, "lm_head"]
    assert list(quantizable_modules(Model(tied=True), config)) == ALL


def test_modules_that_share_a_weight_or_are_the_same_are_left_dense():
    model = Model()
    first, second = model.model.layers
    second.q_proj.weight = first.q_proj.weight
    assert set(quantizable_modules(model, CONFIG)) == {name for name in ALL if not name.endswith("q_proj")}


def test_a_module_in_two_places_is_left_dense_and_stays_one():
    model = Model()
    model.model.layers[1].down_proj = model.model.layers[0].down_proj
    quantize(model)
    first, second = (layer.down_proj for layer in model.model.layers)
    assert first is second
    assert type(first) is nn.Linear


def test_a_block_in_two_places_is_quantized_once():
    model = Model()
    model.model.layers[1] = model.model.layers[0]
    quantize(model)
    assert list(quantized_modules(model)) == ALL[:4]
    assert model.model.layers[1].q_proj is model.model.layers[0].q_proj


def test_a_subclass_of_linear_is_left_alone():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Model()
    model.model.layers[0].q_proj = Scaled(32, 32)
    assert "model.layers.0.q_proj" not in quantizable_modules(model, CONFIG)


def test_compute_dtype_is_that_of_the_weight_or_of_the_config():
    model = quantize(Model().to(torch.bfloat16))
    assert all(layer.compute_dtype == torch.bfloat16 for layer in quantized_modules(model).values())
    model = quantize(Model(), HQQConfig(group_size=16, compute_dtype="float16"))
    assert all(layer.weight.dtype == torch.float16 for layer in quantized_modules(model).values())


def test_modes_and_frozen_biases_are_kept():
    model = Model().eval()
    model.model.layers[0].down_proj.bias.requires_grad_(False)
    quantize(model)
    assert not any(module.training for module in model.modules())
    assert not model.model.layers[0].down_proj.bias.requires_grad
    assert model.model.layers[1].down_proj.bias.requires_grad


def test_one_module_at_a_time_gives_the_bits_of_all_at_once():
    model, other = quantize(Model()), Model()
    for name, spec in quantizable_modules(other, CONFIG).items():
        assert quantize_module(other, name, spec, device="cpu") is other.get_submodule(name)
    assert_unchanged(other, model.state_dict())


# ----- refused: nothing has changed -----


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), name


def with_nan(model: Model) -> None:
    model.model.layers[1].conv.weight.data[3, 3] = torch.nan


def with_inf(model: Model) -> None:
    model.model.layers[1].back.weight.data[-1, -1] = -torch.inf


def with_a_quantized_layer(model: Model) -> None:
    quantize_module(model, "model.layers.1.q_proj", HQQSpec(group_size=8))


def without_layers(model: Model) -> None:
    model.model.layers = nn.ModuleList()


REFUSED = [
    (
        None,
        {"group_size": 64, "on_misfit": "refuse"},
        [f"{name}: in_features" for name in ALL[:5]] + ["and 3 more", "for example 32"],
    ),
    (
        None,
        {"axis": 0, "group_size": 24, "on_misfit": "refuse"},
        [f"{ALL[0]}: out_features=32", f"skip_modules=['{ALL[0]}']"],
    ),
    (
        None,
        {"group_size": 16, "overrides": {"conv": {"group_size": 5}}, "on_misfit": "refuse"},
        [ALL[2], ALL[6]],
    ),
    (None, {"group_size": 16, "skip_modules": ["lm_haed"]}, ["skip_modules", "'lm_haed'", "matches no module"]),
    (None, {"group_size": 16, "overrides": {"layers.7": {}}}, ["overrides", "'layers.7'", "matches no module"]),
    (None, {"group_size": 16, "skip_modules": ["*"]}, ["nothing to quantize"]),
    (without_layers, {"group_size": 16}, ["nothing to quantize"]),
    (with_a_quantized_layer, {"group_size": 16}, ["model.layers.1.q_proj: the layer is quantized already"]),
    (with_nan, {"group_size": 16}, ["model.layers.1.conv", "NaN or Inf"]),
    (with_inf, {"group_size": 16}, ["model.layers.1.back", "NaN or Inf"]),
]


@pytest.mark.parametrize(("change", "fields", "texts"), REFUSED)
def test_a_refused_model_is_as_it_was(change, fields, texts):
    model = Model()
    if change is not None:
        change(model)
    before = copy.deepcopy(model.state_dict())
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"quantize|matches no module|NaN") as refusal:
        quantize(model, HQQConfig(**fields))
    for text in texts:
        assert text in str(refusal.value)
    assert_unchanged(model, before)
    assert dict(model.named_modules()) == modules


def test_a_quantized_layer_that_is_skipped_is_no_obstacle():
    model = Model()
    with_a_quantized_layer(model)
    kept = model.model.layers[1].q_proj
    quantize(model, HQQConfig(group_size=16, skip_modules=["layers.1.q_proj"]))
    assert model.model.layers[1].q_proj is kept
    assert isinstance(kept, QuantizedLinear)
    assert len(quantized_modules(model)) == len(ALL)
