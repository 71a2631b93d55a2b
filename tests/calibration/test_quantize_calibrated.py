"""Quantizing on calibration data: lower output error, the same format, resumable, and nothing lost on refusal."""

import math
import re

import pytest
import torch
from every_method import methods_for, quick_config
from integrations.tiny import tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, Calibration, HQQConfig, quantize_model, quantized_modules
from peft_quantlayers.calibration import finetune
from peft_quantlayers.methods import get_method

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(1))
# HQQ with few bits, and every other method that can be calibrated.
CONFIGS = {name: quick_config(name) for name in methods_for("calibrated")} | {
    "hqq": HQQConfig(nbits=2, group_size=16),
    "aqlm": AQLMConfig(nbits_per_codebook=4),
}
# AQLM's codebooks have more to learn.
FINETUNE_EPOCHS = dict.fromkeys(CONFIGS, 8) | {"aqlm": 16}


def calibration(**fields) -> Calibration:
    """Without asymmetric targets, which have tests of their own."""
    options = {"n_tokens": 640, "sequence_length": 40, "damping": 0.05, "asymmetric_targets": False}
    return Calibration(data=IDS, **(options | fields))


def model_error(model: nn.Module) -> float:
    """Squared distance of the last hidden states on held-out ids from the float model's, relative."""
    with torch.no_grad():
        expected = tiny_model().model(HELD_OUT).last_hidden_state
        found = model.model(HELD_OUT).last_hidden_state.float()
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("method", CONFIGS)
def test_calibration_and_finetuning_each_lower_the_error_on_held_out_data(method):
    errors = []
    finetuned = calibration(finetune_epochs=FINETUNE_EPOCHS[method], learning_rate=0.01)
    for given in (None, calibration(), finetuned):
        model = quantize_model(tiny_model(), CONFIGS[method], calibration=given, progress=False)
        errors.append(model_error(model))
        for layer in quantized_modules(model).values():
            layer.quantized_weight.check(layer.layer_name)
            assert all(not parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.99 * errors[1]


@pytest.mark.parametrize("method", CONFIGS)
def test_the_same_seed_and_data_give_the_same_bits_and_a_saved_model(method, tmp_path):
    models = [
        quantize_model(tiny_model(), CONFIGS[method], calibration=calibration(), progress=False) for _ in range(2)
    ]
    states = [model.state_dict() for model in models]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    pql.save_model(models[0], tmp_path / "model")
    loaded = type(models[0]).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, models[0](IDS).logits)


def test_every_layer_is_reported_with_its_error():
    results = []
    model = quantize_model(
        tiny_model(), CONFIGS["hqq"], calibration=calibration(), progress=False, on_layer=results.append
    )
    layers = quantized_modules(model)
    assert sorted(result.name for result in results) == sorted(layers)
    float_model = tiny_model()
    for result in results:
        weight = float_model.get_submodule(result.name).weight
        lost = (layers[result.name].dequantize() - weight).square().sum() / weight.square().sum()
        assert math.isclose(result.weight_error, float(lost), rel_tol=1e-4)
        assert 0 < result.output_error < result.weight_error
        assert result.bits_per_weight == layers[result.name].quantized_weight.bits_per_weight


def test_a_run_that_was_cut_off_goes_on_where_it_was(tmp_path):
    config, given = CONFIGS["aqlm"], calibration(resume_folder=tmp_path / "blocks", finetune_epochs=1)
    whole = quantize_model(tiny_model(), config, calibration=given, progress=False)
    (tmp_path / "blocks" / "model.layers.1.safetensors").unlink()

    results = []
    resumed = quantize_model(tiny_model(), config, calibration=given, progress=False, on_layer=results.append)
    assert results
    assert all(".layers.1." in result.name for result in results)
    expected, found = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(resumed(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("is_calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_interrupted_model_saves_and_loads_as_it_is_and_a_second_call_does_the_rest(
    method, is_calibrated, tmp_path, monkeypatch, caplog
):
    config, given = CONFIGS[method], calibration() if is_calibrated else None
    whole = quantize_model(tiny_model(), config, calibration=given, progress=False)
    cls, calls = type(get_method(method)), []
    quantize = cls.quantize

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return quantize(*args, **kwargs)

    model = tiny_model()
    monkeypatch.setattr(cls, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, config, calibration=given, progress=False)
    monkeypatch.setattr(cls, "quantize", quantize)
    done = set(quantized_modules(model))
    assert len(done) == 5
    assert "5 of 14 layers are quantized" in caplog.text
    pql.save_model(model, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert set(quantized_modules(loaded)) == done
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)

    quantize_model(model, config, calibration=given, progress=False)
    assert "5 of 14 layers are quantized already" in caplog.text
    expected, found = whole.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    pql.save_model(model, tmp_path / "whole")
    assert torch.equal(type(model).from_pretrained(tmp_path / "whole")(IDS).logits, whole(IDS).logits)


def test_a_model_that_is_quantized_in_part_is_not_finetuned_or_quantized_to_another_spec():
    model, config = tiny_model(), CONFIGS["hqq"]
    quantize_model(model, HQQConfig(nbits=2, group_size=16, skip_modules=["layers.1"]), progress=False)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="Load the float model again"):
        quantize_model(model, config, calibration=calibration(finetune_epochs=1), progress=False)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj: the layer is quantized already"):
        quantize_model(model, HQQConfig(nbits=3, group_size=16), progress=False)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_finetuning_changes_scales_biases_and_norms_and_leaves_dense_weights_and_routers():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 128}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = MixtralForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.self_attn.k_proj.register_parameter("bias", nn.Parameter(torch.full((32,), 0.1)))
        layer.self_attn.v_proj.register_parameter("bias", nn.Parameter(torch.full((32,), 0.1)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = HQQConfig(nbits=2, group_size=16, skip_modules=["q_proj", "k_proj"])
    finetuned = calibration(finetune_epochs=2, learning_rate=0.01)
    quantize_model(model, config, calibration=finetuned, progress=False)
    changed = {
        name.removeprefix("model.layers.0.")
        for name, value in model.state_dict().items()
        if ".layers.0." in name and name in before and not torch.equal(value, before[name])
    }
    assert changed == {"self_attn.v_proj.bias", "input_layernorm.weight", "post_attention_layernorm.weight"}


def test_an_interrupted_finetuning_leaves_the_block_as_it_was_quantized(tmp_path, monkeypatch):
    model, plain = (
        tiny_model(),
        quantize_model(tiny_model(), CONFIGS["aqlm"], calibration=calibration(), progress=False),
    )
    calls = []

    def interrupted(work, energy):
        calls.append(work)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(finetune, "_error", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, CONFIGS["aqlm"], calibration=calibration(finetune_epochs=1), progress=False)
    layers = quantized_modules(model)
    assert layers.keys() == {name for name in quantized_modules(plain) if ".layers.0." in name}
    for name, layer in layers.items():
        assert all(
            torch.equal(tensor, plain.state_dict()[f"{name}.{key}"]) for key, tensor in layer.state_dict().items()
        )
    pql.save_model(model, tmp_path / "model")
    assert torch.equal(type(model).from_pretrained(tmp_path / "model")(IDS).logits, model(IDS).logits)


def test_a_resumed_layer_in_the_place_of_a_conv1d_is_one_still(tmp_path):
    given = calibration(resume_folder=tmp_path)
    models = [quantize_model(tiny_model("gpt2"), CONFIGS["hqq"], calibration=given, progress=False) for _ in range(2)]
    whole, resumed = (quantized_modules(model) for model in models)
    assert {name: layer.is_conv1d for name, layer in resumed.items()} == {
        name: layer.is_conv1d for name, layer in whole.items()
    }
    assert all(layer.is_conv1d for layer in resumed.values())
    assert torch.equal(models[1](IDS).logits, models[0](IDS).logits)


def test_a_truncated_block_is_refused_with_the_file_and_the_remedy(tmp_path):
    given, config = calibration(resume_folder=tmp_path), CONFIGS["hqq"]
    whole = quantize_model(tiny_model(), config, calibration=given, progress=False)
    file, model = tmp_path / "model.layers.1.safetensors", tiny_model()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.layers\.1\.safetensors is damaged or incomplete.*Delete this file"):
        quantize_model(model, config, calibration=given, progress=False)
    assert not quantized_modules(model)
    file.unlink()
    quantize_model(model, config, calibration=given, progress=False)
    assert torch.equal(model(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize("change", ["config", "data", "weights", "order"])
def test_blocks_of_another_run_are_refused_and_the_model_stays(change, tmp_path):
    config, model = CONFIGS["hqq"], tiny_model()
    quantize_model(tiny_model(), config, calibration=calibration(resume_folder=tmp_path), progress=False)
    data = IDS
    if change == "config":
        config = HQQConfig(nbits=3, group_size=16)
    elif change == "data":
        data = IDS.flip(0)
    elif change == "weights":
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    else:
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data[[0, 1]] = weight.data[[1, 0]]
    given = Calibration(data=data, n_tokens=640, sequence_length=40, damping=0.05, resume_folder=tmp_path)
    with pytest.raises(ValueError, match="another run"):
        quantize_model(model, config, calibration=given, progress=False)
    assert not quantized_modules(model)


@pytest.mark.parametrize(
    ("given", "config", "message"),
    [
        ([], CONFIGS["hqq"], "empty"),
        (torch.arange(100), CONFIGS["hqq"], "100 tokens"),
        ("a text " * 100, CONFIGS["aqlm"], "tokenizer="),
        (IDS, AQLMConfig(in_group_size=7), "in_group_size=7"),
        (IDS, HQQConfig(axis=0, group_size=16), "axis=1"),
    ],
    ids=["empty", "few", "no tokenizer", "shape", "axis"],
)
def test_a_refused_call_leaves_the_model_as_it_was(given, config, message):
    model = tiny_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, NotImplementedError), match=message):
        quantize_model(model, config, calibration=given, progress=False)
    assert not quantized_modules(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_bfloat16_model_and_its_head_are_calibrated_too():
    model = tiny_model().to(torch.bfloat16)
    config = HQQConfig(nbits=4, group_size=16, quantize_lm_head=True)
    quantize_model(model, config, calibration=calibration(finetune_epochs=1), progress=False)
    assert "lm_head" in quantized_modules(model)
    assert model(IDS).logits.dtype == torch.bfloat16
    assert model_error(model) < 0.05


def test_codebooks_that_cost_more_than_the_codes_are_warned_about(caplog):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64), nn.Linear(64, 64))
    quantize_model(model, AQLMConfig(num_codebooks=1, nbits_per_codebook=12, rounds=0), progress=False)
    assert "3 layer(s) take more bits" in caplog.text
    assert "130.2 bits per weight, of which codes are 2.0" in caplog.text
    found = re.search(r"use num_codebooks=(\d+), nbits_per_codebook=(\d+)", caplog.text)
    scheme = dict(zip(("num_codebooks", "nbits_per_codebook"), map(int, found.groups()), strict=True))
    assert scheme == {"num_codebooks": 2, "nbits_per_codebook": 4}
    caplog.clear()
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64), nn.Linear(64, 64))
    quantize_model(model, AQLMConfig(**scheme, rounds=0), progress=False)
    assert "bits per weight" not in caplog.text


@pytest.mark.parametrize(
    ("shape", "fields", "found"),
    [
        ((576, 576), {"num_codebooks": 1, "nbits_per_codebook": 16}, "num_codebooks=2, nbits_per_codebook=8"),
        ((64, 64), {"num_codebooks": 1, "nbits_per_codebook": 16}, "num_codebooks=2, nbits_per_codebook=4"),
        ((64, 64), {"num_codebooks": 2, "nbits_per_codebook": 8}, "num_codebooks=2, nbits_per_codebook=4"),
        ((8, 8), {"num_codebooks": 1, "nbits_per_codebook": 8}, ""),
    ],
)
def test_the_scheme_that_is_proposed_fits_the_shape_of_the_layer(shape, fields, found):
    assert AQLMConfig(**fields).spec_for("layer").smaller_metadata(*shape) == found


def test_scales_of_small_groups_that_fit_are_not_warned_about(caplog):
    quantize_model(tiny_model(), HQQConfig(group_size=16), progress=False)
    assert "bits per weight" not in caplog.text
