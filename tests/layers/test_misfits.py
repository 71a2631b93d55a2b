"""Layers whose shape does not fit the config: groups shrink, or the layer stays dense, with one warning."""

import copy
import logging

import pytest
import torch
from every_method import METHODS, all_methods, config_with_default_groups, methods_for, quick_config
from integrations.tiny import tiny_model, token_ids
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.pytorch_utils import Conv1D

from peft_quantlayers import (
    AQLMConfig,
    AQLMSpec,
    Calibration,
    HQQConfig,
    HQQSpec,
    QuantConfig,
    QuantSpec,
    initialize_loftq,
    merge_back,
    quantize_model,
    quantized_modules,
)
from peft_quantlayers.layers.dense_rules import MISFIT
from peft_quantlayers.layers.selection import quantizable_modules, select_modules
from peft_quantlayers.methods.nf4 import NF4Spec


def model_of(*in_features: int, out_features: int = 32) -> nn.Module:
    return nn.Sequential(*(nn.Linear(size, out_features) for size in in_features))


@pytest.mark.parametrize(
    ("in_features", "size"),
    [(4304, 16), (3420, 60), (588, 49), (7688, 62), (2814, 42), (48, 48), (160, 40), (128, 64), (7, 7)],
)
# By hand: the methods whose groups shrink, and by which field.
@pytest.mark.parametrize(("spec", "field"), [(HQQSpec(), "group_size"), (NF4Spec(), "block_size")])
def test_groups_shrink_to_the_largest_divisor_that_is_not_above_the_one_asked_for(spec, field, in_features, size):
    fitted = spec.fitted(96, in_features)
    assert getattr(fitted, field) == size
    fitted.tensor_layout(96, in_features)
    assert spec.to_dict() | {field: size} == fitted.to_dict()


def test_groups_of_outputs_shrink_too():
    assert HQQSpec(axis=0, group_size=64).fitted(48, 31).group_size == 48
    assert HQQSpec(axis=0, group_size=64).fitted(128, 31).group_size == 64
    assert HQQSpec(group_size=None).fitted(48, 31).group_size is None


# By hand: the methods whose groups shrink.
@pytest.mark.parametrize("spec", [HQQSpec(), NF4Spec()])
def test_a_weight_that_would_be_no_smaller_than_in_half_precision_has_no_fitting_spec(spec):
    assert spec.fitted(32, 127) is None  # a prime: every weight would have a scale of its own
    assert spec.fitted(32, 3 * 127).bits_per_weight(32, 3 * 127)[1] < 16


def test_aqlm_groups_do_not_shrink():
    assert AQLMSpec().fitted(32, 3420) is None
    assert AQLMSpec().fitted(32, 3424) == AQLMSpec()
    assert AQLMSpec(out_group_size=2).fitted(31, 64) is None


def config_that_does_not_fit(method: str, **fields) -> QuantConfig | None:
    """A config of ``method`` into which a layer of 60 inputs does not fit; None if any shape does."""
    for field in ("group_size", "block_size", "in_group_size"):
        try:
            config = quick_config(method, **fields)
            return type(config).from_dict(config.to_dict() | {field: 16})
        except (TypeError, ValueError):
            continue
    return None


@all_methods
def test_each_choice_of_each_method(method):
    if config_that_does_not_fit(method) is None:
        assert quick_config(method).spec_for("0").misfit(32, 60) == ""
        return
    model = model_of(64, 60)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"1: in_features=60 is not a multiple of .*=16.*skip_modules=\['1'\]"):
        quantize_model(model, config_that_does_not_fit(method, on_misfit="refuse"), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    dense = quantize_model(copy.deepcopy(model), config_that_does_not_fit(method, on_misfit="dense"), progress=False)
    assert list(quantized_modules(dense)) == ["0"]
    assert torch.equal(dense[1].weight, model[1].weight)
    config = config_that_does_not_fit(method)
    assert config.on_misfit == "shrink"
    expected = config.spec_for("1").fitted(32, 60)
    shrunk = quantize_model(model, config, progress=False)
    assert list(quantized_modules(shrunk)) == (["0"] if expected is None else ["0", "1"])
    if expected is not None:
        assert shrunk[1].spec == expected
        x = torch.randn(2, 60)
        torch.testing.assert_close(shrunk[1](x), nn.functional.linear(x, shrunk[1].dequantize(), shrunk[1].bias))


def test_one_warning_line_names_the_layers_and_their_sizes(caplog):
    model = model_of(64, 4304, 4304, 127)
    with caplog.at_level(logging.WARNING):
        quantizable_modules(model, HQQConfig(nbits=4))
    (line,) = caplog.messages
    assert "\n" not in line
    assert "3 layer(s) do not fit" in line
    assert "1, 2 take group_size=16 instead of 64, 6.0 bits per weight, since in_features=4304" in line
    assert "3 stay dense, since in_features=127 is not a multiple of group_size=64" in line


def test_many_layers_of_one_shape_are_named_by_the_first(caplog):
    quantizable_modules(model_of(*[48] * 9), HQQConfig())
    assert "0, 1, 2 and 6 more take group_size=48" in caplog.text


def test_a_model_that_fits_gets_no_warning(caplog):
    quantizable_modules(model_of(64, 128), HQQConfig())
    assert caplog.text == ""


def test_shapes_are_those_of_the_product_whatever_the_module_keeps():
    model = nn.Sequential(Conv1D(128, 48))  # 48 inputs
    assert quantizable_modules(model, HQQConfig())["0"].group_size == 48


def test_an_override_is_fitted_like_any_other_spec():
    specs = quantizable_modules(model_of(96, 96), HQQConfig(overrides={"1": {"nbits": 8, "group_size": 40}}))
    assert specs == {"0": HQQSpec(group_size=48), "1": HQQSpec(nbits=8, group_size=32)}


def test_the_selection_says_why_a_layer_stays_dense():
    selection = select_modules(model_of(64, 127), HQQConfig())
    assert list(selection.specs) == ["0"]
    assert selection.dense["1"].reason == MISFIT
    assert selection.dense["1"].detail == "in_features=127 is not a multiple of group_size=64"


def test_layers_that_were_fitted_count_as_finished():
    model, config = model_of(96, 64, 60), HQQConfig()
    quantize_model(model, HQQConfig(skip_modules=["2"]), progress=False)
    quantize_model(model, config, progress=False)
    assert [layer.spec.group_size for layer in quantized_modules(model).values()] == [48, 64, 60]
    with pytest.raises(ValueError, match="all 3 layers are quantized already"):
        quantize_model(model, config, progress=False)


def test_a_model_in_which_nothing_fits_is_refused_with_the_shapes():
    with pytest.raises(ValueError, match=r"nothing to quantize: 0 \(in_features=60 is not a multiple"):
        quantize_model(model_of(60), AQLMConfig(), progress=False)


@pytest.mark.parametrize("value", ["smaller", None, True])
def test_an_unknown_choice_is_refused(value):
    with pytest.raises(ValueError, match="on_misfit="):
        HQQConfig(on_misfit=value)


# ----- what goes on with fitted layers: 96 inputs of down_proj, where 64 are asked for


def specs_of(model: nn.Module) -> dict[str, QuantSpec]:
    return {name: layer.spec for name, layer in quantized_modules(model).items()}


# Whose groups, as large as by default, do not fit but shrink.
SHRINKING = {
    name: config
    for name, config in zip(METHODS, map(config_with_default_groups, METHODS), strict=True)
    if config.spec_for("layer").misfit(64, 96) and config.spec_for("layer").fitted(64, 96)
}


@pytest.mark.parametrize("method", [name for name in methods_for("calibrated") if name in SHRINKING])
def test_calibrated_layers_have_the_specs_of_uncalibrated_ones(method):
    config = SHRINKING[method]
    ids = torch.randint(3, 128, (8, 40), generator=torch.Generator().manual_seed(0))
    data = Calibration(data=ids, n_tokens=320, sequence_length=40)
    model = quantize_model(tiny_model(), config, calibration=data, progress=False)
    assert specs_of(model) == specs_of(quantize_model(tiny_model(), config, progress=False))
    assert len(set(specs_of(model).values())) == 2


AXES = SHRINKING | {"hqq-axis-0": HQQConfig(axis=0, group_size=40)}


@pytest.mark.parametrize("config", AXES.values(), ids=AXES)
def test_fitted_layers_train_merge_and_take_loftq(config):
    specs = specs_of(quantize_model(tiny_model(), config, progress=False))
    for merge in (False, True):
        model = quantize_model(tiny_model(), config, progress=False)
        peft_model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        results = initialize_loftq(peft_model, tiny_model(), iterations=2, progress=False)
        assert len(results) == len(specs)
        assert all(result.error_after < result.error_before for result in results)
        peft_model(token_ids(), labels=token_ids()).loss.backward()
        assert all(p.grad.isfinite().all() for p in peft_model.parameters() if p.requires_grad)
        model = merge_back(peft_model, progress=False)[0] if merge else peft_model.unload()
        assert specs_of(model) == specs


@pytest.mark.parametrize("on_misfit", ["shrink", "dense"])
def test_a_choice_means_the_same_in_memory_and_while_loading(on_misfit, tmp_path):
    config = HQQConfig(on_misfit=on_misfit)
    tiny_model().save_pretrained(tmp_path)
    in_memory = quantize_model(tiny_model(), config, progress=False)
    while_loading = type(in_memory).from_pretrained(tmp_path, quantization_config=config)
    assert specs_of(while_loading) == specs_of(in_memory)
    assert len(specs_of(in_memory)) == (14 if on_misfit == "shrink" else 12)


# ----- the models that the default config refused

VISION = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
TEXT = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "mrope_section": [2, 2, 4], "rope_theta": 1e4},
}
TOWER = {
    "depth": 1,
    "hidden_size": 64,
    "intermediate_size": 3420,
    "num_heads": 4,
    "out_hidden_size": 64,
    "patch_size": 8,
    "fullatt_block_indexes": [0],
}


def siglip() -> nn.Module:
    return SiglipVisionModel(SiglipVisionConfig(**VISION, intermediate_size=4304))


def qwen2_5_vl() -> nn.Module:
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=TOWER))


CONFIGS = {name: config_with_default_groups(name) for name in METHODS} | {
    # Not in rounds, of which files in the published format do not say how many there were.
    "aqlm": AQLMConfig(num_codebooks=1, nbits_per_codebook=3),
}


@pytest.mark.parametrize("create", [siglip, qwen2_5_vl])
@all_methods
def test_the_same_layers_and_bits_in_memory_while_loading_and_after_saving(create, method, tmp_path):
    torch.manual_seed(0)
    config = CONFIGS[method]
    model = create()
    model.save_pretrained(tmp_path / "float")
    in_memory = quantize_model(type(model).from_pretrained(tmp_path / "float"), config, progress=False)
    while_loading = type(model).from_pretrained(tmp_path / "float", quantization_config=config)
    specs = {name: layer.spec for name, layer in quantized_modules(in_memory).items()}
    assert specs
    assert specs == {name: layer.spec for name, layer in quantized_modules(while_loading).items()}
    state = while_loading.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in in_memory.state_dict().items())
    if isinstance(model, SiglipVisionModel):  # the names in files of the other are not yet those of its modules
        in_memory.save_pretrained(tmp_path / "quantized")
        loaded = type(model).from_pretrained(tmp_path / "quantized")
        assert specs == {name: layer.spec for name, layer in quantized_modules(loaded).items()}
        state = loaded.state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in in_memory.state_dict().items())
