"""Scale-only finetuning as a PEFT method. Adapters of tuned tensors as files, switched, merged, taken out again."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import QuantScalesConfig

from .tuned_models import (
    ALL,
    assert_same_state,
    every_config,
    logits_of,
    quantized,
    state_of,
    train_steps,
    trained_kinds,
    tuned,
)

pytestmark = pytest.mark.usefixtures("toy_method")


@every_config
def test_the_file_holds_the_tuned_tensors_and_gives_back_the_same_logits(method, tmp_path):
    model = tuned(quantized(method), ALL[method])
    train_steps(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    expected = {
        name.replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "quant_scales_tensors" in name
    }
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) and saved[name].dtype == torch.float32 for name in saved)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "QUANT_SCALES"
    loaded = PeftModel.from_pretrained(quantized(method), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not any(p.requires_grad for p in loaded.parameters())
    again = PeftModel.from_pretrained(quantized(method), tmp_path, is_trainable=True)
    assert trained_kinds(again) == trained_kinds(model)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_loading_onto_a_bfloat16_base_rounds_nothing(low_cpu_mem_usage, tmp_path):
    model = tuned(quantized("hqq", torch.bfloat16), ALL["hqq"])
    train_steps(model)
    model.save_pretrained(tmp_path)
    base = quantized("hqq", torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_state(loaded, state_of(model))
    assert torch.equal(logits_of(loaded), logits_of(model))


@every_config
def test_adapters_switch_and_disabling_gives_the_base_bit_for_bit(method):
    base = quantized(method)
    reference = logits_of(base)
    model = tuned(base, ALL[method])
    train_steps(model)
    first = logits_of(model)
    model.add_adapter("other", QuantScalesConfig(target_modules=["q_proj", "up_proj"]))
    assert torch.equal(logits_of(model), first)
    model.set_adapter("other")
    assert torch.equal(logits_of(model), reference)
    train_steps(model, steps=2)
    second = logits_of(model)
    assert not torch.equal(second, reference)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), reference)
    assert torch.equal(logits_of(model), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits_of(model), second)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_changes_no_logit_and_the_merged_model_saves_and_loads(method, dtype, tmp_path):
    model = tuned(quantized(method, dtype), ALL[method])
    train_steps(model)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), expected)
    assert not any(hasattr(module, "base_layer") for module in merged.modules())
    layers = pql.quantized_modules(merged)
    for name, layer in layers.items():
        layout = layer.spec.tensor_layout(*layer.weight.shape)
        assert {entry.dtype for entry in layout.values() if entry.dtype.is_floating_point} == {torch.float32}
        layer.quantized_weight.check(name)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert_same_state(loaded, state_of(merged))
    assert torch.equal(logits_of(loaded), expected)


def test_merging_biases_or_norms_leaves_the_stored_scales_as_they_are():
    model = tuned(quantized(), ("biases", "norms"))
    train_steps(model)
    expected = logits_of(model)
    merged = model.merge_and_unload()
    assert torch.equal(logits_of(merged), expected)
    assert {layer.spec.scale_dtype for layer in pql.quantized_modules(merged).values()} == {"float16"}


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerging_and_unloading_give_back_the_base_bits(method, dtype):
    base = quantized(method, dtype)
    state = state_of(base)
    specs = {name: layer.spec for name, layer in pql.quantized_modules(base).items()}
    model = tuned(base, ALL[method])
    train_steps(model)
    expected = logits_of(model)
    model.merge_adapter()
    assert torch.equal(logits_of(model), expected)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model), expected)
    unloaded = model.unload()
    assert_same_state(unloaded, state)
    assert {name: layer.spec for name, layer in pql.quantized_modules(unloaded).items()} == specs


def test_a_merged_adapter_is_taken_out_to_disable_it():
    base = quantized()
    reference = logits_of(base)
    model = tuned(base, ALL["hqq"])
    train_steps(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), reference)


def test_merge_back_takes_tuned_scales_too():
    model = tuned(quantized())
    train_steps(model)
    expected = logits_of(model)
    merged, _ = pql.merge_back(model)
    assert torch.equal(logits_of(merged), expected)
