"""An adapter records the quantized base that it was trained on, and says so when it meets another one."""

import json
import warnings

import peft
import pytest
import torch
from integrations.tiny import tiny_model
from peft import AdaLoraConfig, AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

import peft_quantlayers as pql

TARGETS = ["q_proj", "down_proj"]


def quantized(nbits: int = 4, family: str = "llama") -> nn.Module:
    return pql.quantize_model(tiny_model(family), pql.HQQConfig(nbits=nbits, group_size=16), progress=False)


def saved_adapter(folder, model: nn.Module | None = None, **fields) -> str:
    config = LoraConfig(target_modules=TARGETS, r=2, **fields)
    get_peft_model(quantized() if model is None else model, config).save_pretrained(folder)
    return folder


def said_when_loaded(base: nn.Module, folder, **kwargs) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        PeftModel.from_pretrained(base, folder, **kwargs)
    return [str(each.message) for each in caught if "quantized base" in str(each.message)]


def record(folder) -> dict:
    return json.loads((folder / "quantlayers_base.json").read_text())["layers"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_layers_of_the_adapter_are_recorded_by_name(family, tmp_path):
    model = quantized(family=family)
    targets = {"llama": TARGETS, "gpt2": ["c_attn"], "bert": ["query", "value"]}[family]
    get_peft_model(model, LoraConfig(target_modules=targets, r=2)).save_pretrained(tmp_path)
    names = [name for name in pql.quantized_modules(quantized(family=family)) if name.split(".")[-1] in targets]
    assert sorted(record(tmp_path)) == sorted(names)
    assert not said_when_loaded(quantized(family=family), tmp_path)
    assert len(said_when_loaded(quantized(3, family), tmp_path)) == 1


def test_the_users_config_is_left_alone_and_fits_another_base(tmp_path):
    config = LoraConfig(target_modules=TARGETS, r=2)
    model = get_peft_model(quantized(), config)
    assert model.peft_config["default"].target_modules == config.target_modules
    assert not hasattr(config, "quantized_base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        get_peft_model(quantized(3), config)


def test_another_base_is_named_with_its_layers(tmp_path):
    base = quantized()
    base.name_or_path = "the/base"
    folder = saved_adapter(tmp_path, base)
    other = quantized(3)
    other.name_or_path = "another/base"
    (said,) = said_when_loaded(other, folder)
    assert "'the/base'" in said
    assert "'another/base'" in said
    assert "model.layers.0.self_attn.q_proj" in said
    assert "4 of 4 layers" in said


def test_one_changed_layer_is_enough(tmp_path):
    folder = saved_adapter(tmp_path)
    base = quantized()
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight.add_(0.1)
    (said,) = said_when_loaded(base, folder)
    assert "1 of 4 layers" in said
    assert "model.layers.1.mlp.down_proj" in said


def test_a_float_base_is_said_through_every_door(tmp_path):
    tiny_model().save_pretrained(tmp_path / "float")
    base = quantized()
    base.name_or_path = str(tmp_path / "float")  # as where a model is quantized while it is loaded
    folder = saved_adapter(tmp_path / "adapter", base, task_type="CAUSAL_LM")
    (said,) = said_when_loaded(tiny_model(), folder)
    assert "not quantized" in said
    with pytest.warns(UserWarning, match="not quantized.*quantization_config"):
        AutoPeftModelForCausalLM.from_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        AutoPeftModelForCausalLM.from_pretrained(folder, quantization_config=pql.HQQConfig(nbits=4, group_size=16))


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_initialisations_that_write_to_the_base_know_it_again(init, tmp_path):
    folder = saved_adapter(tmp_path, init_lora_weights=init)
    assert not said_when_loaded(quantized(), folder)


def test_a_second_adapter_and_a_merged_first_one_do_not_hide_the_base(tmp_path):
    model = get_peft_model(quantized(), LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False))
    model.merge_adapter()
    model.add_adapter("second", LoraConfig(target_modules=TARGETS, r=2))
    model.save_pretrained(tmp_path)
    assert not said_when_loaded(quantized(), tmp_path / "second")
    merged = get_peft_model(
        quantized(), LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False)
    ).merge_and_unload()
    assert said_when_loaded(merged, tmp_path / "second")


def test_loftq_with_new_codes_records_them(tmp_path):
    model = get_peft_model(quantized(2), LoraConfig(target_modules=TARGETS, r=2))
    pql.initialize_loftq(model, tiny_model(), iterations=2, progress=False)
    model.save_pretrained(tmp_path)
    assert said_when_loaded(quantized(2), tmp_path)
    assert not said_when_loaded(model.unload(), tmp_path)


def test_loading_and_saving_again_keeps_the_record(tmp_path):
    folder = saved_adapter(tmp_path / "first")
    loaded = PeftModel.from_pretrained(quantized(), folder)
    pql.enable_merge_aware(loaded)
    loaded.save_pretrained(tmp_path / "again")
    assert record(tmp_path / "again") == record(folder)


def test_peft_alone_reads_the_config(tmp_path):
    folder = saved_adapter(tmp_path)
    pql.unregister()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            config = PeftConfig.from_pretrained(folder)
        assert type(config) is LoraConfig
        assert set(config.target_modules) == set(TARGETS)
        assert not said_when_loaded(tiny_model(), folder)
    finally:
        pql.register()


@pytest.mark.parametrize("damage", [[], {}, {"layers": []}, {"layers": {"a": 3}}, "x"])
def test_a_damaged_record_is_refused(damage, tmp_path):
    (saved_adapter(tmp_path) / "quantlayers_base.json").write_text(json.dumps(damage))
    with pytest.raises(ValueError, match=r"quantlayers_base.json is damaged"):
        PeftModel.from_pretrained(quantized(), tmp_path)


def test_adapters_on_float_layers_and_other_tuners_are_saved_as_before(tmp_path):
    get_peft_model(tiny_model(), LoraConfig(target_modules=TARGETS)).save_pretrained(tmp_path / "float")
    assert not (tmp_path / "float" / "quantlayers_base.json").exists()
    model = get_peft_model(quantized(), AdaLoraConfig(target_modules=TARGETS, total_step=10))
    assert type(model.peft_config["default"]) is AdaLoraConfig
    assert model.peft_config["default"].peft_type == peft.PeftType.ADALORA


def test_loading_an_adapter_without_a_record_gives_it_none(tmp_path):
    """It was trained before, and it is not known on what."""
    (saved_adapter(tmp_path) / "quantlayers_base.json").unlink()
    config = LoraConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path, config=config)
    assert loaded.peft_config["default"] is config
    loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "quantlayers_base.json").exists()
    PeftModel.from_pretrained(quantized(), tmp_path, is_trainable=True).save_pretrained(tmp_path / "trained")
    assert len(record(tmp_path / "trained")) == 4
