"""Merging adapters that are merged already starts from the unmerged model; an error at the end changes nothing."""

import copy

import pytest
import torch
from every_method import all_methods, quick_config
from integrations.tiny import tiny_model
from lora.test_stack_layer import adapted as adapted_mixture
from lora.test_stack_layer import quantized as quantized_mixture
from peft import LoHaConfig, LoraConfig, PeftModel, PolyConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.layers.quantized_storage import QuantizedStorage

IDS = torch.randint(3, 128, (1, 512), generator=torch.Generator().manual_seed(0))
DATA = pql.Calibration(data=IDS, n_tokens=512, sequence_length=64)
pytestmark = pytest.mark.usefixtures("toy_method")


def adapted(config: pql.QuantConfig | None = None, **fields: object) -> PeftModel:
    base = pql.quantize_model(tiny_model(), config or pql.HQQConfig(nbits=4, group_size=16), progress=False)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], **fields))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[:, :64]).logits


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model: nn.Module, bits: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == bits.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in bits.items())


@all_methods
def test_scores_are_of_the_adapter_and_of_the_merge_and_not_of_the_merge_before(method):
    def size(model: nn.Module) -> float:
        return float(logits(model).norm())

    model = adapted(quick_config(method))
    expected = size(model)
    once, _ = pql.merge_back(copy.deepcopy(model), strategy="requantize", progress=False)
    pql.merge_back(model, strategy="dense", unload=False, progress=False)
    merged, report = pql.merge_back(model, strategy="requantize", metric=size, progress=False)
    assert report.scores[0] == pytest.approx(expected)
    assert torch.equal(logits(merged), logits(once))


def test_tuning_learns_what_the_adapter_predicts_and_not_the_merge_before():
    options = {"strategy": "requantize", "calibration": DATA, "tune_epochs": 2, "progress": False}
    model = adapted()
    once, _ = pql.merge_back(copy.deepcopy(model), **options)
    plain, _ = pql.merge_back(copy.deepcopy(model), strategy="requantize", progress=False)
    pql.merge_back(model, strategy="requantize", unload=False, progress=False)
    again, _ = pql.merge_back(model, **options)
    assert not torch.equal(logits(once), logits(plain))
    assert torch.equal(logits(again), logits(once))


def test_a_calibrated_merge_after_another_one_gives_the_same_as_alone():
    options = {"strategy": "calibrated", "progress": False}
    options["calibration"] = pql.Calibration(data=IDS, n_tokens=512, sequence_length=64, finetune_epochs=1)
    model = adapted()
    alone, _ = pql.merge_back(copy.deepcopy(model), **options)
    pql.merge_back(model, strategy="requantize", unload=False, progress=False)
    again, _ = pql.merge_back(model, **options)
    assert torch.equal(logits(again), logits(alone))


@pytest.mark.parametrize("first", ["dense", "keep", "requantize"])
def test_experts_that_were_merged_to_something_else_are_merged_again(first):
    model = adapted_mixture(quantized_mixture("mixtral"), "mixtral", modules=["q_proj"])
    options = {"strategy": "calibrated", "calibration": DATA, "progress": False}
    alone, wanted = pql.merge_back(copy.deepcopy(model), **options)
    pql.merge_back(model, strategy=first, unload=False, progress=False)
    merged, report = pql.merge_back(model, **options)
    assert [layer.name for layer in report.layers] == [layer.name for layer in wanted.layers]
    assert {layer.strategy for layer in report.layers} == {"calibrated"}
    assert torch.equal(logits(merged), logits(alone))


@pytest.mark.parametrize("strategy", ["requantize", "keep"])
def test_what_was_written_since_a_merge_is_not_lost_without_a_word(strategy):
    model = adapted()
    pql.merge_back(model, strategy="requantize", unload=False, progress=False)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.get_base_layer().weight.data.mul_(2)
    bits = bits_of(model)
    with pytest.raises(ValueError, match=r"q_proj: its weight was written since .* unmerge_adapter\(\) first"):
        pql.merge_back(model, strategy=strategy, progress=False)
    assert_same(model, bits)


def test_a_stack_that_was_written_since_its_merge_is_not_taken_back():
    model = adapted_mixture(quantized_mixture("mixtral"), "mixtral")
    model.merge_adapter()
    layer = next(module for module in model.modules() if type(module).__name__ == "LoraQuantizedStack")
    layer.unmerged_stack()[0].mul_(2)
    bits = bits_of(model)
    for call in (layer.unmerge, layer.merge):
        layer.merged_adapters[:] = ["default"] if call == layer.unmerge else []
        with pytest.raises(RuntimeError, match="written since"):
            call()
        assert_same(model, bits)


@all_methods
def test_tuned_scales_that_were_written_since_their_merge_are_not_taken_back(method):
    base = pql.quantize_model(tiny_model(), quick_config(method), progress=False)
    model = get_peft_model(base, pql.QuantScalesConfig(target_modules=["q_proj"]))
    model.merge_adapter()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.base_layer.weight.data.mul_(2)
    bits = bits_of(model)
    with pytest.raises(RuntimeError, match=r"q_proj: its weights were written since .*merge_and_unload"):
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="q_proj: its weight was written since"):
        pql.merge_back(model, progress=False)
    assert_same(model, bits)


@pytest.mark.parametrize("strategy", ["exact", "aware"])
def test_a_strategy_for_linear_layers_is_refused_by_an_experts_merge(strategy):
    model = adapted_mixture(quantized_mixture("mixtral"), "mixtral")
    bits = bits_of(model)
    pql.set_merge_strategy(model, strategy)
    with pytest.raises(ValueError, match="adapters on linear layers, and these are on experts"):
        model.merge_adapter()
    assert_same(model, bits)


REFUSED = {
    "exact": "cannot be merged exactly",
    "aware": "not trained merge-aware",
    "append": "cannot be extended",
    "calibrated": "not possible",
    "keep": "supports plain LoRA",
}


@pytest.mark.parametrize("strategy", REFUSED)
def test_adapters_and_layers_of_another_kind_are_refused_before_the_metric_runs(strategy):
    config = pql.HQQConfig(nbits=4, group_size=16, axis=0 if strategy == "calibrated" else 1)
    model = adapted(config, use_dora=strategy == "keep")
    bits, scored = bits_of(model), []
    options = {"calibration": DATA} if strategy == "calibrated" else {}
    with pytest.raises((ValueError, NotImplementedError), match=rf"layers\.0.*{REFUSED[strategy]}"):
        pql.merge_back(model, strategy=strategy, metric=scored.append, progress=False, **options)
    assert not scored
    assert_same(model, bits)


@pytest.mark.parametrize("kind", [LoraConfig, LoHaConfig])
def test_an_error_of_pefts_at_the_very_end_leaves_the_model_as_it_was(kind, monkeypatch):
    base = pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=4, group_size=16), progress=False)
    model = get_peft_model(base, kind(r=2, target_modules=["q_proj"])).eval()
    model.add_adapter("other", kind(r=2, target_modules=["q_proj"]))
    bits, expected = bits_of(model), logits(model)
    modules = {name: type(module) for name, module in model.named_modules()}

    def fails(**options: object) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(model.base_model, "merge_and_unload", fails)
    monkeypatch.setattr(model, "merge_and_unload", fails, raising=False)
    with pytest.raises(RuntimeError, match="no memory left"):
        pql.merge_back(model, adapters=["other"], progress=False)
    assert_same(model, bits)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.active_adapters == ["default"]
    assert torch.equal(logits(model), expected)


def test_adapters_that_peft_cannot_merge_are_refused_in_words():
    model = get_peft_model(tiny_model(), PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2))
    with pytest.raises(NotImplementedError, match="PEFT has no merge for adapters of PolyModel"):
        pql.merge_back(model, progress=False)


@pytest.mark.parametrize("strategy", ["keep", "requantize"])
def test_layers_that_round_their_inputs_do_so_after_a_merge(strategy):
    model = adapted()
    pql.set_activation_bits(model, 8)
    merged, _ = pql.merge_back(model, strategy=strategy, progress=False)
    layers = [module for module in merged.modules() if isinstance(module, QuantizedStorage)]
    assert layers
    assert {layer.activation_bits for layer in layers} == {8}
