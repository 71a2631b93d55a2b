"""merge_back with PEFT's other tuners and with tuned scales: true figures, and strategies refused by name."""

import copy

import pytest
import torch
from every_method import all_methods, quick_config
from integrations.tiny import tiny_model
from peft import (
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import QuantScalesConfig
from peft_quantlayers.evaluate import capture

HELD_OUT = torch.randint(3, 128, (256,), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "down_proj"]
TUNERS = {
    "hra": lambda: HRAConfig(r=4, target_modules=TARGETS),
    "ia3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "loha": lambda: LoHaConfig(r=4, target_modules=TARGETS),
    "oft": lambda: OFTConfig(oft_block_size=16, target_modules=TARGETS),
    "osf": lambda: OSFConfig(target_modules=TARGETS),
    "miss": lambda: MissConfig(r=4, target_modules=TARGETS),
}


def tuned(config, method: str = "hqq", base: nn.Module | None = None) -> PeftModel:
    torch.manual_seed(0)
    base = base or pql.quantize_model(tiny_model(), quick_config(method), progress=False)
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def logits(model: nn.Module, ids: torch.Tensor = HELD_OUT[None]) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())


@all_methods
@pytest.mark.parametrize("tuner", TUNERS)
def test_capture_is_that_of_the_model_that_comes_out(tuner, method):
    model = tuned(TUNERS[tuner](), method)
    before = copy.deepcopy(model)
    merged, report = pql.merge_back(model, strategy="requantize", evaluate_on=HELD_OUT)

    def base(ids: torch.Tensor) -> torch.Tensor:
        with before.disable_adapter():
            return logits(before, ids)

    true = capture(lambda ids: logits(before, ids), base, lambda ids: logits(merged, ids), HELD_OUT, window=256)
    assert report.capture.kl_adapter_base > 0
    assert report.capture.kl_adapter_merged == pytest.approx(true.kl_adapter_merged, rel=0.05)
    assert report.capture.kl_adapter_merged > 0
    assert {layer.adapters for layer in report.layers} == {("default",)}


@pytest.mark.parametrize("tuner", TUNERS)
def test_dense_loses_nothing(tuner):
    model = tuned(TUNERS[tuner]())
    expected = logits(model)
    merged, report = pql.merge_back(model, strategy="dense", evaluate_on=HELD_OUT)
    torch.testing.assert_close(logits(merged), expected)
    assert not pql.quantized_modules(merged)
    assert report.relative_error == pytest.approx(0.0, abs=1e-6)


def test_dense_of_a_model_with_transposed_layers_loses_nothing():
    base = pql.quantize_model(tiny_model("gpt2"), quick_config("hqq"), progress=False)
    model = tuned(LoHaConfig(r=4, target_modules=["c_attn"]), base=base)
    expected = logits(model)
    merged, _ = pql.merge_back(model, strategy="dense", evaluate_on=HELD_OUT)
    torch.testing.assert_close(logits(merged), expected)


@pytest.mark.parametrize("strategy", ["aware", "exact", "keep", "append", "calibrated"])
@pytest.mark.parametrize("tuner", ["loha", "ia3"])
def test_strategies_of_lora_are_refused_by_name(tuner, strategy):
    model = tuned(TUNERS[tuner]())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"(?s)q_proj.*{strategy}.*requantize"):
        pql.merge_back(model, strategy=strategy, calibration=HELD_OUT if strategy == "calibrated" else None)
    assert_unchanged(model, before)


@pytest.mark.parametrize("strategy", ["auto", "exact", "dense"])
def test_tuned_scales_merge_exactly_and_their_capture_is_measured(strategy):
    model = tuned(QuantScalesConfig(train=("scales", "norms")))
    expected = logits(model)
    merged, report = pql.merge_back(model, strategy=strategy, evaluate_on=HELD_OUT)
    torch.testing.assert_close(logits(merged), expected)
    assert report.capture.kl_adapter_base > 1e-4
    assert report.capture.capture == pytest.approx(1.0, abs=1e-3)
    before, after = report.bits
    assert after == 32 if strategy == "dense" else before < after < 32  # merging widens what was tuned
    assert report.delta_retained == pytest.approx(1.0)
    assert report.relative_error == 0


def test_strategies_of_lora_are_refused_for_tuned_scales():
    model = tuned(QuantScalesConfig(train=("scales",)))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"(?s)'keep'.*exact"):
        pql.merge_back(model, strategy="keep")
    assert_unchanged(model, before)


@pytest.mark.parametrize("strategy", ["aware", "exact", "keep", "append"])
def test_what_needs_a_quantized_layer_is_refused_where_the_adapter_lies_on_none(strategy):
    model = tuned(LoraConfig(target_modules=TARGETS), base=tiny_model())
    with pytest.raises(ValueError, match="on none"):
        pql.merge_back(model, strategy=strategy)
    expected = logits(model)
    torch.testing.assert_close(logits(pql.merge_back(model)[0]), expected)


def test_lora_on_a_model_that_was_dequantized_under_it_is_merged_as_peft_does():
    model = tuned(LoraConfig(target_modules=TARGETS))
    pql.dequantize_model(model)
    expected = logits(model)
    torch.testing.assert_close(logits(pql.merge_back(model, strategy="dense")[0]), expected)


@pytest.mark.parametrize("arguments", [{"strategy": "dense"}, {"evaluate_on": HELD_OUT}], ids=["dense", "evaluate_on"])
def test_what_needs_the_weight_from_before_is_refused_after_a_merge(arguments):
    model = tuned(TUNERS["loha"]())
    model.merge_adapter()
    before = snapshot(model)
    with pytest.raises(ValueError, match="unmerge_adapter"):
        pql.merge_back(model, **arguments)
    assert_unchanged(model, before)
    pql.merge_back(model)


def test_a_layer_that_fails_half_way_leaves_all_layers_unmerged(monkeypatch):
    model = tuned(TUNERS["loha"]())
    before, expected = snapshot(model), logits(model)
    last = model.base_model.model.model.layers[1].mlp.down_proj
    with monkeypatch.context() as patch:
        patch.setattr(last, "get_delta_weight", lambda *args, **kwargs: torch.full((64, 96), float("nan")))
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
            pql.merge_back(model)
    assert_unchanged(model, before)
    assert torch.equal(logits(model), expected)


def test_a_mixed_model_and_prompts_are_told_what_to_do_instead():
    base = pql.quantize_model(tiny_model(), quick_config("hqq"), progress=False)
    mixed = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=TARGETS), mixed=True)
    with pytest.raises(TypeError, match=r"PeftMixedModel.*merge_and_unload"):
        pql.merge_back(mixed)
    prompts = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(TypeError, match=r"PROMPT_TUNING.*nothing to merge"):
        pql.merge_back(prompts)


def test_choosing_a_strategy_for_another_tuner_says_that_strategies_are_for_lora():
    with pytest.raises(ValueError, match="other tuners"):
        pql.set_merge_strategy(tuned(TUNERS["loha"]()), "keep")


@all_methods
@pytest.mark.parametrize("merge", ["merge_back", "merge_and_unload", "merge_adapter"])
def test_an_adapter_without_a_change_moves_no_code(merge, method):
    base = pql.quantize_model(tiny_model(), quick_config(method), progress=False)
    before = snapshot(base)
    model = get_peft_model(base, LoHaConfig(r=4, target_modules=TARGETS))
    if merge == "merge_back":
        pql.merge_back(model)
    elif merge == "merge_and_unload":
        model.merge_and_unload()
    else:
        model.merge_adapter()
        model.unmerge_adapter()
        model.unload()
    assert_unchanged(base, before)
