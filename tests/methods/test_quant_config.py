"""What a user asks for: patterns, overrides and strictness."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch

from peft_quantlayers.methods import AQLMConfig, HQQConfig, HQQSpec, config_type, registered_methods
from peft_quantlayers.methods.quant_config import matches


@pytest.mark.parametrize(
    ("name", "pattern", "is_meant"),
    [
        ("model.layers.0.mlp.down_proj", "down_proj", True),
        ("model.layers.0.mlp.down_proj", "mlp.down_proj", True),
        ("model.layers.0.mlp.down_proj", "layers.0.*", True),
        ("model.layers.0.mlp.down_proj", "model.layers.?.mlp.*", True),
        ("model.layers.10.mlp.down_proj", "layers.1.*", False),
        ("model.layers.0.mlp.down_proj", "own_proj", False),
        ("model.layers.0.mlp.down_proj", "down", False),
        ("model.layers.0.mlp.down_proj", "Down_proj", False),
        ("down_proj", "down_proj", True),
    ],
)
def test_a_pattern_means_a_name_or_its_last_parts(name, pattern, is_meant):
    assert matches(name, pattern) is is_meant


def test_a_later_override_wins_and_fields_add_up():
    config = HQQConfig(nbits=3, overrides={"down_proj": {"nbits": 8}, "layers.0.*": {"nbits": 4, "group_size": 32}})
    assert config.spec_for("layers.1.q_proj") == HQQSpec(nbits=3)
    assert config.spec_for("layers.1.down_proj") == HQQSpec(nbits=8)
    assert config.spec_for("layers.0.down_proj") == HQQSpec(nbits=4, group_size=32)


def test_a_skipped_module_takes_what_is_below_it_along():
    config = HQQConfig(skip_modules=["layers.0", "*_head"])
    assert config.is_skipped("model.layers.0.mlp.down_proj")
    assert config.is_skipped("value_head")
    assert not config.is_skipped("model.layers.1.mlp.down_proj")
    assert not HQQConfig().is_skipped("anything")


def test_a_config_survives_json():
    config = HQQConfig(
        nbits=3,
        compute_dtype="bfloat16",
        skip_modules=["a", "b"],
        overrides={"down": {"nbits": 8}},
        quantize_lm_head=True,
    )
    fields = json.loads(json.dumps(config.to_dict()))
    assert fields.pop("quant_method") == "quantlayers"
    assert fields.pop("method") == "hqq"
    assert HQQConfig(**fields) == config


def test_a_torch_dtype_is_as_good_as_its_name():
    assert HQQConfig(compute_dtype=torch.bfloat16) == HQQConfig(compute_dtype="bfloat16")
    types = [config_type(method.spec_type) for method in registered_methods().values()]
    for config in [each for each in types if "scale_dtype" in {field.name for field in dataclasses.fields(each)}]:
        assert config(scale_dtype=torch.float16) == config(scale_dtype="float16")
        with pytest.raises(ValueError, match=r"scale_dtype=torch\.int8|scale_dtype='int8'"):
            config(scale_dtype=torch.int8)
    overrides = {"down_proj": {"scale_dtype": torch.float32}}
    assert HQQConfig(overrides=overrides).spec_for("down_proj").scale_dtype == "float32"


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        ({"nbits": 7}, ValueError, "nbits=7"),
        ({"compute_dtype": "int8"}, ValueError, "compute_dtype"),
        ({"skip_modules": "lm_head"}, TypeError, "list of name patterns"),
        ({"skip_modules": [3]}, TypeError, "list of name patterns"),
        ({"overrides": ["down_proj"]}, TypeError, "overrides"),
        ({"overrides": {"down_proj": 8}}, TypeError, "down_proj"),
        ({"overrides": {"down_proj": {"nbits": 7}}}, ValueError, r"overrides\['down_proj'\]: nbits=7"),
        ({"overrides": {"down_proj": {"bits": 4}}}, ValueError, r"overrides\['down_proj'\]: unknown field.*bits"),
        ({"overrides": {"down_proj": {"skip_modules": []}}}, ValueError, "unknown field"),
        ({"quantize_lm_head": "no"}, ValueError, "quantize_lm_head"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_when_it_is_made(fields, error, text):
    with pytest.raises(error, match=text):
        HQQConfig(**fields)


def test_an_unknown_argument_is_refused_with_the_fields_that_there_are():
    with pytest.raises(TypeError, match=r"HQQConfig has no field \['groupsize'\].*'group_size'.*'nbits'"):
        HQQConfig(groupsize=64)
    with pytest.raises(TypeError, match=r"HQQConfig has no field \['calibration'\].*quantize_model\(model, HQQConfig"):
        HQQConfig(calibration=["a text"])
    with pytest.raises(TypeError, match=r"AQLMConfig has no field \['nbits'\].*'nbits_per_codebook'"):
        AQLMConfig(nbits=2)


def test_a_config_is_copied_and_pickled_as_it_is():
    config = AQLMConfig(num_codebooks=3, skip_modules=["a"])
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, rounds=1).num_codebooks == 3
