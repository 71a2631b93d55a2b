"""QA-LoRA on quantized layers: what it computes, that it merges exactly, and where it is refused."""

import copy

import pytest
import torch
from every_method import METHODS, methods_for, quick_config
from lora.test_layer import Two, assert_same_bits, bits_of
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig

WITHOUT_GROUP_OFFSETS = [name for name in METHODS if name not in methods_for("exact")]


def qalora_model(*, scale_dtype: str = "float32", nbits: int = 3, size: int = 16, **fields) -> nn.Module:
    torch.manual_seed(0)
    base = pql.quantize_model(Two(), HQQConfig(nbits=nbits, group_size=16, scale_dtype=scale_dtype), progress=False)
    config = LoraConfig(r=4, target_modules=["first", "second"], use_qalora=True, qalora_group_size=size, **fields)
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        lora_B = layer.lora_B["default"].weight
        lora_B.data = 0.01 * torch.randn(lora_B.shape, generator=generator)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("size", [16, 32])
def test_the_adapter_sees_the_mean_of_each_group_times_the_number_of_groups(size, x):
    layer = qalora_model(size=size).base_model.model.first
    lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert lora_A.shape == (4, 64 // size)
    pooled = torch.stack([x[:, start : start + size].mean(1) for start in range(0, 64, size)], dim=1) * (64 // size)
    expected = layer.get_base_layer()(x) + pooled @ lora_A.t() @ lora_B.t() * layer.scaling["default"]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("through_peft", [True, False], ids=["merge_and_unload", "merge_back"])
def test_the_merged_model_computes_the_same_and_no_code_or_scale_has_moved(size, through_peft, x):
    model = qalora_model(size=size)
    bits, expected = bits_of(model), model(x)
    merged = model.merge_and_unload() if through_peft else pql.merge_back(model, strategy="exact")[0]
    assert (expected - merged(x)).norm() < 1e-6 * expected.norm()
    assert type(merged.first) is pql.HQQLinear
    for name in ("first", "second"):
        stored = {key.rpartition(".")[2]: value for key, value in bits.items() if f".{name}." in key}
        layer = merged.get_submodule(name)
        assert torch.equal(layer.W_q, stored["W_q"])
        assert torch.equal(layer.scale, stored["scale"])
        assert not torch.equal(layer.zero, stored["zero"])


def test_float16_zeros_are_widened_where_they_would_lose_the_delta(x, caplog):
    model = qalora_model(scale_dtype="float16")
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].weight.data *= 1e-2
    expected = model(x)
    merged, report = pql.merge_back(model, strategy="exact")
    assert merged.first.spec.scale_dtype == "float32"
    assert "first" in caplog.text
    assert "float32" in caplog.text
    assert (expected - merged(x)).norm() < 1e-5 * expected.norm()
    assert report.layers[0].bits_after == report.layers[0].bits_before + 2 * 16 / 16


def test_float16_zeros_stay_where_they_hold_the_delta():
    model = qalora_model(scale_dtype="float16")
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].weight.data *= 30
    merged, report = pql.merge_back(model, strategy="exact")
    assert merged.first.spec.scale_dtype == "float16"
    assert report.delta_retained == pytest.approx(1.0, abs=1e-3)
    assert all(layer.error_norm < 0.01 * layer.delta_norm for layer in report.layers)


def test_ten_merges_and_unmerges_leave_the_same_bits_and_dtypes(x):
    model = qalora_model(scale_dtype="float16")
    bits, expected = bits_of(model), model(x)
    for _ in range(10):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, bits)
    assert model.base_model.model.first.get_base_layer().spec.scale_dtype == "float16"
    assert torch.equal(model(x), expected)


def test_two_adapters_of_different_pooling_merge_exactly_together(x):
    model = qalora_model()
    other = LoraConfig(r=2, target_modules=["first"], use_qalora=True, qalora_group_size=32, init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    merged, report = pql.merge_back(model, strategy="exact")
    assert report.layers[0].adapters == ("default", "other")
    assert (expected - merged(x)).norm() < 1e-6 * expected.norm()


def test_a_plain_adapter_is_not_merged_exactly_and_the_model_left_as_it_was(x):
    model = qalora_model()
    model.add_adapter("plain", LoraConfig(r=2, target_modules=["second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    bits, expected = bits_of(model), model(x)
    with pytest.raises(ValueError, match=r"second.*use_qalora=True"):
        pql.merge_back(model, strategy="exact")
    assert_same_bits(model, bits)
    assert torch.equal(model(x), expected)


def test_an_adapter_without_a_delta_leaves_the_bits():
    model = qalora_model()
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].weight.data.zero_()
    bits = bits_of(copy.deepcopy(model))
    model.merge_adapter()
    assert_same_bits(model, bits)


@pytest.mark.parametrize("size", [8, 24])
def test_a_group_size_that_does_not_fit_is_refused_with_the_one_to_set(size):
    with pytest.raises(ValueError, match=r"first: qalora_group_size=.*Set qalora_group_size=16"):
        qalora_model(size=size)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (HQQConfig(group_size=16, axis=0), "axis=1"),
        (HQQConfig(group_size=16, integer_zero=True), "integer_zero=False"),
        *((quick_config(name), name) for name in WITHOUT_GROUP_OFFSETS),
    ],
    ids=["axis0", "integer_zero", *WITHOUT_GROUP_OFFSETS],
)
@pytest.mark.usefixtures("toy_method")
def test_weights_without_a_float_zero_for_each_group_are_refused(config, why):
    base = pql.quantize_model(Two(), config, progress=False)
    lora = LoraConfig(r=4, target_modules=["first"], use_qalora=True, qalora_group_size=16)
    with pytest.raises(NotImplementedError, match=f"first.*{why}"):
        get_peft_model(base, lora)


def test_dora_beside_qalora_is_refused():
    with pytest.raises(NotImplementedError, match="use_dora"):
        qalora_model(use_dora=True)
