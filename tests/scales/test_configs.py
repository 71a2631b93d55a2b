"""Scale-only finetuning as a PEFT method. Configs and what they select; what is refused, with the model left alone."""

import copy

import peft
import pytest
import torch
from every_method import METHODS
from integrations.tiny import tiny_model, token_ids
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, QuantScalesConfig

from .tuned_models import (
    CONFIGS,
    _metadata,
    assert_same_state,
    logits_of,
    quantized,
    state_of,
    train_steps,
    tuned,
)

pytestmark = pytest.mark.usefixtures("toy_method")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {"0.self_attn.q_proj", "1.self_attn.q_proj"}),
        ({"target_modules": r".*\.1\..*_proj"}, None),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, None),
        ({"target_modules": ["down_proj"], "layers_to_transform": 1}, {"1.mlp.down_proj"}),
        ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0.*"}, None),
    ],
)
def test_targets_are_named_as_in_peft(fields, expected):
    everywhere = {name.removeprefix("model.layers.") for name in pql.quantized_modules(quantized())}
    expected = expected or {name for name in everywhere if name.startswith("1.")}
    model = tuned(quantized(), **fields)
    assert {name.removeprefix("model.layers.") for name in model.base_model.targeted_module_names} == expected


def test_norms_follow_exclusions_and_layers():
    model = tuned(quantized(), ("norms",), exclude_modules=["post_attention_layernorm"], layers_to_transform=[1])
    assert model.base_model.targeted_module_names == ["model.layers.1.input_layernorm"]


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = tuned(quantized(), ("scales", "norms"), modules_to_save=["lm_head", "model.norm"])
    train_steps(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {"base_model.model.lm_head.weight", "base_model.model.model.norm.weight"} < saved.keys()
    loaded = PeftModel.from_pretrained(quantized(), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_the_users_config_stays_as_it_was_and_serves_several_models():
    config = QuantScalesConfig(train=("scales",))
    before = copy.deepcopy(config)
    for method in CONFIGS:
        get_peft_model(quantized(method), config)
    before.base_model_name_or_path = config.base_model_name_or_path  # PEFT's to write, and until 0.21 it did
    assert config == before


def test_the_config_survives_json(tmp_path):
    config = QuantScalesConfig(target_modules=["q_proj"], train=["biases", "scales", "biases"])
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is QuantScalesConfig
    assert loaded == config
    assert loaded.train == ("biases", "scales")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"train": ("gains",)}, ValueError, r"\['gains'\] cannot be trained.*codebooks"),
        ({"train": ()}, ValueError, "nothing to train"),
        ({"train": "scales"}, TypeError, r"train=\('scales',\)"),
        ({"train": (3,)}, TypeError, "tuple of names"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, ValueError, "layers_to_transform cannot be combined"),
    ],
)
def test_a_config_that_means_nothing_is_refused(fields, error, message):
    with pytest.raises(error, match=message):
        QuantScalesConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": ("codebooks",)}, r"no \['codebooks'\] to train.*only \['biases', 'scales', 'zeros'\]"),
        ({"train": ("scales", "biases"), "target_modules": ["up_proj"]}, r"no \['biases'\]"),
        ({"target_modules": ["nowhere"]}, r"nowhere.*match no quantized layer.*model\.layers\.0"),
        ({"target_modules": ["lm_head"]}, r"lm_head is not a quantized layer.*exclude_modules"),
        ({"target_modules": None}, "match no quantized layer"),
        ({"train": ("norms",), "exclude_modules": ".*"}, "no norm layer"),
    ],
)
def test_a_config_that_does_not_fit_the_model_is_refused_and_the_model_left_alone(fields, message):
    base = quantized()
    for parameter in base.model.norm.parameters():
        parameter.requires_grad = True
    wanted = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    modules, state = [type(module) for module in base.modules()], state_of(base)
    with pytest.raises(ValueError, match=message):
        tuned(base, **fields)
    assert [type(module) for module in base.modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in base.named_parameters()} == wanted
    assert_same_state(base, state)
    assert not hasattr(base, "peft_config")


def test_whole_zeros_are_not_trained():
    base = pql.quantize_model(tiny_model(), HQQConfig(group_size=32, integer_zero=True), progress=False)
    with pytest.raises(ValueError, match=r"no \['zeros'\] to train"):
        tuned(base, ("scales", "zeros"))


def test_a_model_without_quantized_layers_is_refused():
    with pytest.raises(ValueError, match=r"no quantized layer.*quantize_model"):
        tuned(tiny_model())


@pytest.mark.parametrize(
    "other",
    [
        HQQConfig(nbits=4, group_size=32),
        HQQConfig(nbits=3, group_size=16),
        *(config for name, config in CONFIGS.items() if name != "hqq"),
    ],
    ids=str,
)
def test_an_adapter_of_another_quantization_is_refused_and_changes_nothing(other, tmp_path):
    # 3 bits have scales of the same shape as 4 bits: only the codes tell that these are other scales.
    model = tuned(quantized())
    model.save_pretrained(tmp_path)
    base = pql.quantize_model(tiny_model(), other, progress=False)
    state = state_of(base)
    with pytest.raises(ValueError, match=r"model\.layers\.\d.*other codes.*base that it was trained on"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_same_state(base, state)

    second = tuned(base)
    state = state_of(second)
    with pytest.raises(ValueError, match="other codes"):
        second.load_adapter(tmp_path, "second")
    assert_same_state(second, state)
    assert list(second.peft_config) == ["default"]


@pytest.mark.parametrize(("method", "part"), [(m, part) for m in METHODS for part in _metadata(m)])
def test_a_base_with_the_same_codes_and_other_metadata_is_refused(method, part, tmp_path):
    tuned(quantized(method)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(quantized(method), tmp_path)
    base = quantized(method)
    base.model.layers[1].mlp.up_proj.get_parameter(part).data.mul_(1.01)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*base that it was trained on"):
        PeftModel.from_pretrained(base, tmp_path)


def test_a_damaged_file_is_refused_with_the_tensor_named(tmp_path):
    model = tuned(quantized(), target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :1].clone()}, file)
    with pytest.raises(RuntimeError, match=r"q_proj\.quant_scales_tensors\.default\.scale"):
        PeftModel.from_pretrained(quantized(), tmp_path)


def test_a_broken_adapter_is_not_merged_into_any_layer():
    base = quantized()
    state = state_of(base)
    model = tuned(base)
    with torch.no_grad():
        [p for p in model.parameters() if p.requires_grad][-1][0, 0] = float("nan")
    for merge in (model.merge_adapter, model.merge_and_unload, lambda: pql.merge_back(model)):
        with pytest.raises(ValueError, match=r"down_proj.* NaN or Inf"):
            merge()
    assert_same_state(model.unload(), state)


def test_what_cannot_be_combined_is_refused():
    model = tuned(quantized())
    model.add_adapter("other", QuantScalesConfig())
    with pytest.raises(ValueError, match="cannot be active together"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="cannot merge"):
        model.merge_adapter(["default", "other"])
    with pytest.raises(NotImplementedError, match="mixed batches"):
        model(token_ids(), adapter_names=["default", "other"])
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="cannot merge"):
        model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.add_adapter("third", QuantScalesConfig())
    model.unmerge_adapter()

    with pytest.raises(ValueError, match="LoRA on top of tuned scales"):
        get_peft_model(model.base_model.model, peft.LoraConfig(target_modules=["q_proj"]))
    lora = get_peft_model(quantized(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj carries an adapter of another kind \(LoraQuantizedLinear\)"):
        tuned(lora.base_model.model)
    norms = get_peft_model(quantized(), peft.LNTuningConfig(target_modules=["input_layernorm"]))
    with pytest.raises(ValueError, match=r"input_layernorm carries an adapter of another kind \(LNTuningLayer\)"):
        tuned(norms.base_model.model, ("norms",))


def test_unregistering_takes_it_out_of_peft_and_registering_puts_it_back():
    pql.unregister()
    try:
        assert "QUANT_SCALES" not in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        assert "QUANT_SCALES" not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
        assert "QUANT_SCALES" not in peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING
    finally:
        pql.register()
    assert peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING["QUANT_SCALES"] is pql.QuantScalesModel
