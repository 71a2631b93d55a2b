"""keep: the adapter stays as a low-rank branch of a layer that saves and loads without PEFT."""

import json

import pytest
import torch
from every_method import all_methods, quick_config
from integrations.tiny import saved_tiny_model, tiny_model, token_ids
from lora.test_layer import assert_same_bits, bits_of, quantized_two, with_adapter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig

# A bfloat16 layer rounds the scaled product elsewhere than PEFT does.
TOLERANCE = {torch.float32: {}, torch.bfloat16: {"rtol": 0.05, "atol": 0.02}}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("lora_bias", [False, True])
def test_the_kept_branch_computes_what_the_adapters_did(lora_bias, x):
    model = with_adapter(quantized_two(nbits=2), lora_bias=lora_bias)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False, use_rslora=True))
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    merged, report = pql.merge_back(model, strategy="keep")
    assert merged.first.branch.rank == 6
    assert merged.second.branch.rank == 4
    torch.testing.assert_close(merged(x), expected)
    assert report.delta_retained == pytest.approx(1.0, abs=1e-5)
    assert report.layers[0].bits_after == pytest.approx(report.layers[0].bits_before + 32 * 6 * (64 + 96) / (64 * 96))


def test_through_peft_with_the_strategy_set_on_the_model(x):
    model = with_adapter(quantized_two(nbits=2))
    expected, bits = model(x), bits_of(model)
    pql.set_merge_strategy(model, "keep")
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert_same_bits(model, bits)
    assert model.base_model.model.first.get_base_layer().branch is None
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_a_second_adapter_is_kept_beside_the_first(x):
    kept, _ = pql.merge_back(with_adapter(quantized_two(nbits=2)), strategy="keep")
    model = get_peft_model(kept, LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
    expected = model(x)
    merged, report = pql.merge_back(model, strategy="keep")
    assert merged.first.branch.rank == 7
    assert report.delta_retained == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(merged(x), expected)


def test_a_dense_merge_onto_a_kept_model_keeps_its_branch(x):
    kept, _ = pql.merge_back(with_adapter(quantized_two(nbits=2)), strategy="keep")
    model = get_peft_model(kept, LoraConfig(r=3, target_modules=["first"], init_lora_weights=False))
    expected = model(x)
    merged, report = pql.merge_back(model, strategy="dense")
    torch.testing.assert_close(merged(x), expected)
    assert report.delta_retained == pytest.approx(1.0, abs=1e-4)


def test_a_dequantized_model_has_the_branch_in_its_weights(x):
    merged, _ = pql.merge_back(with_adapter(quantized_two(nbits=2)), strategy="keep")
    expected = merged(x)
    torch.testing.assert_close(pql.dequantize_model(merged)(x), expected)


def test_dora_is_refused_and_the_model_left_as_it_was(x):
    model = with_adapter(quantized_two(), use_dora=True)
    bits = bits_of(model)
    with pytest.raises(NotImplementedError, match=r"first.*dense"):
        pql.merge_back(model, strategy="keep")
    assert_same_bits(model, bits)


@all_methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kept_model_saves_and_loads_without_peft(method, dtype, tmp_path):
    config = quick_config(method)
    float_model = saved_tiny_model(tmp_path / "float")
    base = AutoModelForCausalLM.from_pretrained(float_model, dtype=dtype, quantization_config=config)
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    with torch.no_grad():
        expected = model(token_ids()).logits
        merged, _ = pql.merge_back(model, strategy="keep")
        pql.save_model(merged, tmp_path / "kept")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=dtype).eval()
        torch.testing.assert_close(merged(token_ids()).logits, expected, **TOLERANCE[dtype])
        assert torch.equal(loaded(token_ids()).logits, merged(token_ids()).logits)
    stored = json.loads((tmp_path / "kept" / "config.json").read_text())["quantization_config"]
    assert stored["format_version"] >= 2
    assert stored["branches"]["model.layers.0.self_attn.q_proj"] == 3
    branch = loaded.model.layers[0].self_attn.q_proj.branch
    assert branch.A.dtype == torch.float32
    assert not branch.A.requires_grad


@pytest.mark.parametrize(
    ("branches", "match"),
    [({"model.layers.0.self_attn.q_proj": "3"}, "integer"), ({"lm_head": 3}, "lm_head"), ([3], "mapping")],
)
def test_a_damaged_config_is_refused(branches, match, tmp_path):
    base = pql.quantize_model(tiny_model(), HQQConfig(group_size=32), progress=False)
    pql.save_model(base, tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    fields = json.loads(path.read_text())
    fields["quantization_config"] |= {"format_version": 2, "branches": branches}
    path.write_text(json.dumps(fields))
    with pytest.raises((TypeError, ValueError), match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
