"""``quantization_config`` means what it says: as a mapping, as transformers' config, and beside a saved model."""

import logging

import pytest
import torch
from every_method import all_methods, quick_config
from transformers import AqlmConfig, AutoConfig, AutoModelForCausalLM, HqqConfig, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer, AutoQuantizationConfig

import peft_quantlayers as pql


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path / "float")
    model = AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=pql.HQQConfig(nbits=8))
    pql.save_model(model, path / "hqq")
    aqlm = pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=3, in_group_size=8)
    pql.save_model(AutoModelForCausalLM.from_pretrained(path / "float", quantization_config=aqlm), path / "aqlm")
    return path


def specs_of(model):
    return {str(layer.spec) for layer in pql.quantized_modules(model).values()}


HQQ_FIELDS = [
    {"quant_method": "hqq", "nbits": 8, "group_size": 16},
    {"quant_method": "hqq", "nbits": 8, "group_size": 16, "skip_modules": ["lm_head"], "quant_zero": False, "axis": 1},
    {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8, "group_size": 16, "axis": 1}}},
    pql.HQQConfig(nbits=8, group_size=16).to_dict(),
    {"quant_method": "quantlayers", "method": "hqq", "nbits": 8, "group_size": 16},
]


@pytest.mark.parametrize("fields", HQQ_FIELDS, ids=["flat", "flat with more", "nested", "to_dict", "short"])
def test_a_mapping_quantizes_with_the_fields_that_it_names(fields, folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=dict(fields))
    assert specs_of(model) == {str(pql.HQQSpec(nbits=8, group_size=16))}
    assert len(pql.quantized_modules(model)) == 7


def test_overrides_in_a_mapping_leave_no_other_layer_dense(folder):
    fields = pql.HQQConfig(nbits=4, overrides={"down_proj": {"nbits": 8}}).to_dict()
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=fields)
    assert len(pql.quantized_modules(model)) == 7
    assert specs_of(model) == {str(pql.HQQSpec(nbits=4)), str(pql.HQQSpec(nbits=8))}


@all_methods
def test_the_mapping_of_every_method_makes_its_config_again(method, folder):
    config = quick_config(method)
    model = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config.to_dict())
    assert specs_of(model) == {str(config.spec_for("x"))}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_method": "hqq", "nbits": 8, "grup_size": 16}, "grup_size.*group_size"),
        ({"quant_method": "hqq", "nbits": 7}, "nbits"),
        ({"quant_method": "hqq", "nbits": 4, "quant_zero": True}, "quant_zero=True.*floating here"),
        ({"quant_method": "quantlayers", "nbits": 8}, '"method"'),
        ({"quant_method": "quantlayers", "modules": {}, "specs": []}, "the fields of a saved model"),
        ({"quant_method": "aqlm", "num_codebooks": 2}, r"AQLMConfig\(.*num_codebooks=2"),
    ],
)
def test_a_mapping_that_says_what_cannot_be_is_refused(fields, message, folder):
    with pytest.raises((ValueError, TypeError), match=message):
        AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=fields)


# By hand: the two folders, and the methods that transformers has configs of.
AGREE = {
    "ours": ("hqq", pql.HQQConfig(nbits=8)),
    "mapping": ("hqq", {"quant_method": "hqq", "nbits": 8}),
    "transformers'": ("hqq", HqqConfig(nbits=8, group_size=64)),
    "aqlm": ("aqlm", pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=3)),
    "transformers' aqlm": ("aqlm", AqlmConfig(num_codebooks=1, nbits_per_codebook=3)),
}


@pytest.mark.parametrize("case", AGREE)
def test_the_config_of_a_saved_model_given_again_is_ignored_with_a_warning(case, folder, caplog):
    name, config = AGREE[case]
    with caplog.at_level(logging.WARNING, "peft_quantlayers"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, quantization_config=config)
    assert "quantized already, as quantization_config says" in caplog.text
    plain = AutoModelForCausalLM.from_pretrained(folder / name)
    ids = torch.arange(8)[None]
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


# By hand: our own format and the published one of AQLM.
@pytest.mark.parametrize("name", ["hqq", "aqlm"])
@pytest.mark.parametrize("read", [dict, AutoQuantizationConfig.from_dict], ids=["mapping", "object"])
def test_the_fields_of_the_saved_model_itself_are_taken_as_it_is(read, name, folder):
    """lm-eval reads the config of a model and hands it over with the model."""
    saved = AutoConfig.from_pretrained(folder / name).quantization_config
    model = AutoModelForCausalLM.from_pretrained(folder / name, quantization_config=read(saved))
    assert specs_of(model) == specs_of(AutoModelForCausalLM.from_pretrained(folder / name))


def test_the_fields_of_another_saved_model_are_refused(folder):
    saved = AutoConfig.from_pretrained(folder / "aqlm").quantization_config
    with pytest.raises(ValueError, match=r"quantization_config is that of another saved model.*Leave it out"):
        AutoModelForCausalLM.from_pretrained(
            folder / "hqq", quantization_config=AutoQuantizationConfig.from_dict(saved)
        )


@pytest.mark.parametrize(
    ("name", "config"),
    # By hand: two folders, each with what it does not hold.
    [
        ("hqq", pql.HQQConfig(nbits=4)),
        ("hqq", pql.AQLMConfig()),
        ("hqq", {"quant_method": "hqq", "nbits": 2}),
        ("aqlm", pql.HQQConfig(nbits=8)),
        ("aqlm", AqlmConfig(num_codebooks=2, nbits_per_codebook=8)),
    ],
)
def test_another_config_than_that_of_a_saved_model_is_refused(name, config, folder):
    with pytest.raises(ValueError, match=r"quantized already: model\.layers\.0.*asks for.*Leave it out"):
        AutoModelForCausalLM.from_pretrained(folder / name, quantization_config=config)


def test_unregistering_gives_transformers_its_own_comparison_back():
    assert AutoHfQuantizer.merge_quantization_configs.__module__.startswith("peft_quantlayers")
    pql.unregister()
    try:
        assert AutoHfQuantizer.merge_quantization_configs.__module__ == "transformers.quantizers.auto"
    finally:
        pql.register()


@pytest.mark.parametrize(
    ("config", "factor"),
    # By hand: one case of AQLM, one of HQQ.
    [
        (pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=3, rounds=2), 1),
        (pql.HQQConfig(nbits=4, group_size=32), 1e-7),
    ],
    ids=["what the file does not keep", "scales that had to be wider"],
)
def test_what_was_saved_with_a_config_agrees_with_it(config, factor, folder, tmp_path, caplog):
    model = AutoModelForCausalLM.from_pretrained(folder / "float")
    model.model.layers[0].mlp.up_proj.weight.data *= factor
    pql.save_model(pql.quantize_model(model, config, progress=False), tmp_path / "saved")
    AutoModelForCausalLM.from_pretrained(tmp_path / "saved", quantization_config=config)
    assert "as quantization_config says" in caplog.text
