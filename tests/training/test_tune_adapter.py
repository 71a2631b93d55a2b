"""Adapters trained against the float model as a whole: nearer predictions, nothing else changed, refused by name."""

import dataclasses

import pytest
import torch
from every_method import quick_config
from integrations.tiny import tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import Calibration, HQQConfig

IDS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(0)).repeat(4, 1)
# One batch, on which the tuning is judged too: what random weights learn need not carry over to others.
DATA = Calibration(data=IDS, n_tokens=160, sequence_length=160)
TUNED = {"tune_epochs": 8, "learning_rate": 1e-2, "progress": False}


def float_model(family: str = "llama") -> nn.Module:
    model = tiny_model(family)
    model.get_output_embeddings().weight.data.mul_(8)  # random weights alone predict nothing
    return model


def adapted(config: pql.QuantConfig, family: str = "llama", **lora) -> nn.Module:
    base = pql.quantize_model(float_model(family), config, progress=False)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | lora))).eval()


def divergence(model: nn.Module, family: str = "llama") -> float:
    ids = IDS.view(1, -1)
    with torch.no_grad():
        theirs, ours = (each(ids).logits.log_softmax(-1) for each in (float_model(family), model))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_model_predicts_more_like_the_float_model_and_only_the_adapter_changes(family):
    model = adapted(HQQConfig(nbits=2, group_size=16), family)
    before = state_of(model)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    pql.initialize_loftq(model, float_model(family), calibration=DATA, progress=False)
    fitted = divergence(model, family)
    pql.initialize_loftq(model, float_model(family), calibration=DATA, **TUNED)
    assert divergence(model, family) < 0.9 * fitted
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    assert {tensor.dtype for name, tensor in state_of(model).items() if "lora_" in name} == {torch.float32}


def test_other_methods_and_half_precision_adapters(tmp_path):
    model = adapted(quick_config("aqlm"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    pql.initialize_loftq(model, float_model(), calibration=DATA, progress=False)
    fitted = divergence(model)
    pql.initialize_loftq(model, float_model(), calibration=DATA, **TUNED)
    assert divergence(model) < fitted
    assert {parameter.dtype for name, parameter in model.named_parameters() if "lora_" in name} == {torch.bfloat16}


def test_recorded_predictions_do_what_the_model_in_memory_does(tmp_path):
    float_model().save_pretrained(tmp_path / "float")
    pql.record_predictions(float_model(), DATA, progress=False).save(tmp_path / "teacher.safetensors")
    found = []
    for teacher, source in ((None, float_model()), (tmp_path / "teacher.safetensors", tmp_path / "float")):
        model = adapted(HQQConfig(nbits=2, group_size=16))
        pql.initialize_loftq(model, source, calibration=DATA, teacher=teacher, **TUNED)
        found.append(state_of(model))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    # A teacher knows its data: weights alone are fitted without any.
    model = adapted(HQQConfig(nbits=2, group_size=16))
    pql.initialize_loftq(model, tmp_path / "float", teacher=tmp_path / "teacher.safetensors", **TUNED)
    assert divergence(model) < divergence(adapted(HQQConfig(nbits=2, group_size=16)))


def test_a_tuned_adapter_is_trained_merged_saved_and_loaded_as_any_other(tmp_path):
    model = adapted(HQQConfig(nbits=3, group_size=16))
    pql.initialize_loftq(model, float_model(), calibration=DATA, **TUNED)
    model(IDS, labels=IDS).loss.backward()
    model.save_pretrained(tmp_path / "adapter")
    expected = model(IDS).logits
    again = adapted(HQQConfig(nbits=3, group_size=16)).unload()
    loaded = PeftModel.from_pretrained(again, tmp_path / "adapter")
    assert torch.equal(loaded.eval()(IDS).logits, expected)
    merged, _ = pql.merge_back(model, strategy="keep", progress=False)
    assert torch.allclose(merged(IDS).logits, expected, atol=1e-3)


def test_what_cannot_be_tuned_is_refused_and_nothing_is_changed(tmp_path):
    float_model().save_pretrained(tmp_path / "float")
    model = adapted(HQQConfig(nbits=2, group_size=16))
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    teacher = pql.record_predictions(float_model(), DATA, progress=False)
    before = state_of(model)
    for options, error, message in (
        ({"tune_epochs": 1}, ValueError, "needs what the float model predicts"),
        ({"tune_epochs": 1, "calibration": DATA, "float_model": tmp_path / "float"}, ValueError, "teacher=, which"),
        ({"tune_epochs": -1}, ValueError, "tune_epochs"),
        ({"teacher": teacher}, ValueError, "Give both or neither"),
        ({"teacher": 3, "tune_epochs": 1}, TypeError, "teacher must be"),
        ({"tune_epochs": 1, "learning_rate": 0.0, "calibration": DATA}, ValueError, "learning_rate"),
        ({"tune_epochs": 1, "calibration": DATA, "adapter": "other"}, ValueError, r"set_adapter\('other'\) first"),
        ({"tune_epochs": 1, "teacher": tmp_path / "float/model.safetensors"}, ValueError, "holds no predictions"),
    ):
        given = {"float_model": float_model(), "progress": False} | options
        with pytest.raises(error, match=message):
            pql.initialize_loftq(model, **given)
    wrong = dataclasses.replace(teacher, log_probs=[each * float("nan") for each in teacher.log_probs])
    with pytest.raises(ValueError, match="not finite"):
        pql.initialize_loftq(model, float_model(), teacher=wrong, tune_epochs=1, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(model).items())
