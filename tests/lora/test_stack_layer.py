"""LoRA on quantized experts: PEFT's own target_parameters, its files, no dense weights, merging and its way back."""

import copy
import functools
import logging

import pytest
import torch
from every_method import all_methods, quick_config
from mixtures import MIXTURES, codes, same, tiny_mixture
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.layers.quantized_layers import quantized_stacks
from peft_quantlayers.lora import LoraQuantizedStack

IDS = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(3))
CONFIG = pql.HQQConfig(nbits=4, group_size=16)
TARGETS = {
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
    "jetmoe": ["input_linear.weight", "output_linear.weight"],
}


def targets_of(family: str) -> list[str]:
    return TARGETS.get(family, ["experts.gate_up_proj", "experts.down_proj"])


@functools.cache
def _quantized(family: str, config) -> nn.Module:
    return pql.quantize_model(tiny_mixture(family), config, progress=False)


def quantized(family: str, config=CONFIG) -> nn.Module:
    """A copy: one quantization does for all tests."""
    return copy.deepcopy(_quantized(family, config))


def dense_twin(model: nn.Module) -> nn.Module:
    twin = pql.layers.dequantize_model(copy.deepcopy(model))
    twin.set_experts_implementation("eager")
    return twin


def adapted(model: nn.Module, family: str, *, modules=(), **fields) -> PeftModel:
    """With an adapter whose B is no longer zero."""
    config = LoraConfig(
        target_modules=list(modules), target_parameters=targets_of(family), r=2, lora_alpha=8, **fields
    )
    torch.manual_seed(5)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.2)
    return peft_model


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    logits = model(IDS, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def stack_layers(model: nn.Module) -> list[LoraQuantizedStack]:
    return [module for module in model.modules() if isinstance(module, LoraQuantizedStack)]


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_an_adapter_computes_as_peft_does_on_dense_experts(family):
    model = quantized(family)
    twin = adapted(dense_twin(model), family)
    peft_model = adapted(model, family)
    layers = stack_layers(peft_model)
    assert layers
    assert all(isinstance(layer, ParamWrapper) for layer in layers)
    ours, theirs = ({n: p.shape for n, p in m.named_parameters() if ".lora_" in n} for m in (peft_model, twin))
    assert ours == theirs
    (logits, grads), (expected, expected_grads) = loss_and_gradients(peft_model), loss_and_gradients(twin)
    assert (logits - expected).abs().max() <= 2e-6 * max(1.0, float(expected.abs().max()))
    assert grads.keys() == expected_grads.keys() != set()
    for name, grad in grads.items():
        wanted = expected_grads[name]
        assert (grad - wanted).norm() <= 2e-5 * wanted.norm() + 1e-8, name


@pytest.mark.parametrize("implementation", ["quantlayers", "eager"])
def test_both_implementations_add_the_adapter(implementation):
    peft_model = adapted(quantized("gpt_oss"), "gpt_oss")
    logits, grads = loss_and_gradients(peft_model)
    peft_model.get_base_model().set_experts_implementation(implementation)
    other, other_grads = loss_and_gradients(peft_model)
    torch.testing.assert_close(logits, other, atol=1e-5, rtol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], atol=1e-6, rtol=1e-4)


def test_no_dense_stack_and_no_dense_delta_is_made(monkeypatch):
    peft_model = adapted(quantized("qwen3_moe"), "qwen3_moe")
    monkeypatch.setattr(ParamWrapper, "get_delta_weight", None)
    monkeypatch.setattr(ParamWrapper, "get_delta_factors", None, raising=False)  # since PEFT 0.21
    for name in ("dequantize", "dequantize_expert", "dense_weight"):
        monkeypatch.setattr(type(next(iter(quantized_stacks(peft_model).values()))), name, None)
    loss_and_gradients(peft_model)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4", "jetmoe"])
def test_adapters_travel_between_quantized_and_dense_models(family, tmp_path):
    model = quantized(family)
    dense = dense_twin(model)
    peft_model, twin = adapted(copy.deepcopy(model), family), adapted(copy.deepcopy(dense), family)
    peft_model.save_pretrained(tmp_path / "ours")
    twin.save_pretrained(tmp_path / "theirs")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert same(first, second)
    expected = twin(IDS).logits
    for base in (model, dense):
        for folder in ("ours", "theirs"):
            loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
            torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-5)


def test_a_stranger_base_is_warned_of(tmp_path, recwarn):
    adapted(quantized("qwen3_moe"), "qwen3_moe").save_pretrained(tmp_path)
    PeftModel.from_pretrained(quantized("qwen3_moe"), tmp_path)
    assert not [w for w in recwarn if "trained on the quantized base" in str(w.message)]
    with pytest.warns(UserWarning, match="have other codes"):
        PeftModel.from_pretrained(quantized("qwen3_moe", pql.HQQConfig(nbits=3, group_size=16)), tmp_path)
    with pytest.warns(UserWarning, match="are not quantized"):
        PeftModel.from_pretrained(tiny_mixture("qwen3_moe"), tmp_path)


def test_attention_and_experts_train_together_and_several_adapters_live_side_by_side():
    peft_model = adapted(quantized("qwen3_moe"), "qwen3_moe", modules=["q_proj", "v_proj"])
    first = peft_model(IDS).logits
    config = LoraConfig(target_modules=["q_proj", "v_proj"], target_parameters=targets_of("qwen3_moe"), r=3)
    peft_model.add_adapter("second", config)
    assert torch.equal(peft_model(IDS).logits, first)
    peft_model.set_adapter("second")
    with peft_model.disable_adapter():
        base = peft_model(IDS).logits
    torch.testing.assert_close(peft_model(IDS).logits, base)
    assert not torch.allclose(base, first)
    assert torch.equal(peft_model.get_base_model()(IDS).logits, base)
    peft_model.delete_adapter("second")
    peft_model.set_adapter("default")
    assert torch.equal(peft_model(IDS).logits, first)


def test_dropout_drops_while_training_only():
    peft_model = adapted(quantized("qwen3_moe"), "qwen3_moe", lora_dropout=0.5).eval()
    expected = adapted(quantized("qwen3_moe"), "qwen3_moe")(IDS).logits
    torch.testing.assert_close(peft_model(IDS).logits, expected)
    peft_model.train()
    one, other = peft_model(IDS).logits, peft_model(IDS).logits
    assert not torch.allclose(one, other)
    layer = stack_layers(peft_model)[0]
    assert layer.lora_dropout["default"].p == 0.5
    for each in stack_layers(peft_model):
        each.lora_dropout["default"].p = 0.0
    torch.testing.assert_close(peft_model(IDS).logits, expected)


def test_gradient_checkpointing_gives_the_same_gradients():
    peft_model = adapted(quantized("mixtral"), "mixtral").train()
    _, expected = loss_and_gradients(peft_model)
    model = pql.prepare_model_for_kbit_training(peft_model)
    _, grads = loss_and_gradients(model)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize(
    ("family", "strategy"),
    # "auto" requantizes; tests/contract has that for every method.
    [(family, strategy) for family in sorted(MIXTURES) for strategy in ("requantize", "keep", "dense")]
    + [("qwen3_moe", "auto")],
)
def test_every_strategy_merges_and_is_undone_to_the_bit(family, strategy):
    peft_model = adapted(quantized(family, pql.HQQConfig(nbits=8, group_size=16)), family)
    with_adapter, before = peft_model(IDS).logits, codes(peft_model)
    merged, report = pql.merge_back(
        peft_model, strategy=strategy, unload=False, progress=False, evaluate_on=IDS.flatten()
    )
    assert {layer.name for layer in report.layers} == set(quantized_stacks(quantized(family)))
    assert min(layer.delta_retained for layer in report.layers) > 0.95
    assert report.capture.capture > 0.9
    rounding = 0.2 if family == "nemotron_h" else 0.1  # whose experts square what they compute
    tolerance = 1e-4 if strategy in ("keep", "dense") else rounding
    difference = (merged(IDS).logits - with_adapter).norm() / with_adapter.norm()
    assert difference < tolerance
    merged.unmerge_adapter()
    assert same(codes(peft_model), before)
    assert torch.equal(peft_model(IDS).logits, with_adapter)


def test_peft_merges_unmerges_and_unloads_by_the_chosen_strategy():
    peft_model = adapted(quantized("qwen3_moe", pql.HQQConfig(nbits=8, group_size=16)), "qwen3_moe")
    with_adapter, before = peft_model(IDS).logits, codes(peft_model)
    pql.set_merge_strategy(peft_model, "requantize")
    peft_model.merge_adapter()
    assert not same(codes(peft_model), before)
    merged = peft_model(IDS).logits
    peft_model.unmerge_adapter()
    assert same(codes(peft_model), before)
    model = peft_model.merge_and_unload()
    assert torch.equal(model(IDS).logits, merged)
    assert (merged - with_adapter).norm() < 0.05 * with_adapter.norm()
    assert len(quantized_stacks(model)) == 4
    assert not stack_layers(model)


def test_an_unloaded_adapter_leaves_the_base_as_it_was():
    model = quantized("gpt_oss")
    before, expected = codes(model), model(IDS).logits
    peft_model = adapted(model, "gpt_oss")
    assert not torch.allclose(peft_model(IDS).logits, expected)
    base = peft_model.unload()
    assert same(codes(base), before)
    assert torch.equal(base(IDS).logits, expected)


@all_methods
def test_every_method_trains_and_merges_on_experts(method):
    peft_model = adapted(quantized("qwen3_moe", quick_config(method)), "qwen3_moe")
    twin = adapted(dense_twin(quantized("qwen3_moe", quick_config(method))), "qwen3_moe")
    torch.testing.assert_close(peft_model(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-5)
    before, with_adapter = codes(peft_model), peft_model(IDS).logits
    peft_model.merge_adapter()
    assert not same(codes(peft_model), before)
    peft_model.unmerge_adapter()
    assert same(codes(peft_model), before)
    assert torch.equal(peft_model(IDS).logits, with_adapter)


def test_kept_branches_are_saved_with_the_model(tmp_path):
    from transformers import AutoModelForCausalLM

    peft_model = adapted(quantized("gpt_oss"), "gpt_oss")
    expected = peft_model(IDS).logits
    model, _ = pql.merge_back(peft_model, strategy="keep", progress=False)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    pql.save_model(model, tmp_path / "kept")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32)
    saved, found = model.state_dict(), loaded.state_dict()
    assert list(found) == list(saved)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    # To rounding: some CPUs' products depend on where a float matrix begins in memory.
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-5)
    # A second adapter on top is kept beside the first.
    again = adapted(loaded, "gpt_oss")
    expected = again(IDS).logits
    model, _ = pql.merge_back(again, strategy="keep", progress=False)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"use_dora": True}, ValueError, "use_dora"),
        ({"init_lora_weights": "pissa"}, NotImplementedError, "needs the dense weights of all experts"),
        ({"init_lora_weights": "olora"}, NotImplementedError, "needs the dense weights of all experts"),
        ({"use_qalora": True}, NotImplementedError, "use_qalora is for linear layers"),
        ({"lora_bias": True}, ValueError, "lora_bias"),
    ],
)
def test_what_needs_dense_experts_is_refused(fields, error, said):
    with pytest.raises(error, match=said):
        adapted(quantized("qwen3_moe"), "qwen3_moe", **fields)


def test_target_parameters_that_name_nothing_are_refused_with_the_names_that_exist():
    for wrong in (
        "experts.w1", "self_attn.q_proj.weight", "experts", "gate_up_proj.W_q", "layers.7.mlp.experts.gate_up_proj",
    ):  # fmt: skip
        model = quantized("qwen3_moe")
        config = LoraConfig(target_modules=[], target_parameters=["experts.down_proj", wrong])
        with pytest.raises(ValueError, match=rf"\['{wrong}'\] name no parameter.*experts\.gate_up_proj"):
            get_peft_model(model, config)
        assert not [module for module in model.modules() if isinstance(module, ParamWrapper)]


@pytest.mark.parametrize("target", ["experts", "gate_up_proj"])
def test_experts_among_target_modules_are_refused_with_the_parameters_to_name(target):
    model = quantized("qwen3_moe")
    before = [type(module) for module in model.modules()]
    said = r"experts.gate_up_proj: .*target_parameters=\[.*'experts.gate_up_proj'\] instead of target_modules"
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, LoraConfig(target_modules=["q_proj", target]))
    assert [type(module) for module in model.modules()] == before


def test_experts_of_a_shape_that_does_not_fit_are_refused_with_the_way_out():
    config = pql.HQQConfig(group_size=16, overrides={"experts.*": {"group_size": 48}}, on_misfit="refuse")
    model = tiny_mixture("qwen3_moe")
    with pytest.raises(ValueError, match=r"experts.gate_up_proj: in_features=64 is not a multiple of group_size=48"):
        pql.quantize_model(model, config, progress=False)
    assert not quantized_stacks(model)


def test_strategies_of_linear_layers_are_refused_by_name():
    for strategy in ("exact", "aware"):
        with pytest.raises(ValueError, match="strategy="):
            pql.merge_back(adapted(quantized("qwen3_moe"), "qwen3_moe"), strategy=strategy, progress=False)


def test_a_broken_adapter_is_not_merged_and_the_stacks_stay():
    peft_model = adapted(quantized("qwen3_moe"), "qwen3_moe")
    before = codes(peft_model)
    stack_layers(peft_model)[0].lora_B["default"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="NaN or Inf"):
        pql.merge_back(peft_model, progress=False)
    with pytest.raises(ValueError, match="NaN or Inf"):
        peft_model.merge_adapter()
    assert same(codes(peft_model), before)


def test_a_dense_and_a_quantized_parameter_of_one_module_nest_as_in_peft(tmp_path):
    config = pql.HQQConfig(nbits=4, group_size=16, skip_modules=["gate_up_proj"])
    model = quantized("qwen3_moe", config)
    twin = adapted(dense_twin(model), "qwen3_moe")
    peft_model = adapted(model, "qwen3_moe")
    twin.save_pretrained(tmp_path)
    ours, theirs = ({n for n, _ in m.named_parameters() if ".lora_" in n} for m in (peft_model, twin))
    assert ours == theirs
    torch.testing.assert_close(peft_model(IDS).logits, twin(IDS).logits, atol=1e-5, rtol=1e-5)


def test_nothing_is_said_where_nothing_is_wrong(caplog):
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        adapted(quantized("qwen3_moe"), "qwen3_moe")
    assert not caplog.records
