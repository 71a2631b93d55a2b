"""The config object of a quantized model: its format, its fields, and what it describes."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig
from peft_quantlayers.integrations.transformers_config import QuantlayersConfig, describe_model

from .tiny import tiny_model

CONFIGS = {  # By hand: a method for each of two formats.
    "aqlm": AQLMConfig(num_codebooks=1, nbits_per_codebook=4, rounds=0),
    "quantlayers": HQQConfig(nbits=4, group_size=32),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_models_config_knows_the_format_in_which_it_is_written(name, tmp_path):
    model = pql.quantize_model(tiny_model(), CONFIGS[name], progress=False)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for candidate in (model, copy.deepcopy(model), loaded):
        config = candidate.config.quantization_config
        assert config.checkpoint_format.name == name
        assert config.quant_method == "quantlayers"  # in memory each is a model of ours
        assert json.loads(json.dumps(config.to_dict())) == written
    found, expected = describe_model(loaded), describe_model(model)
    assert found.dense_linears == expected.dense_linears == ("lm_head",)
    assert set(found.specs) == set(expected.specs)
    if name == "quantlayers":  # the published AQLM format holds the scheme, not how often its codes were fitted
        assert found == expected


@pytest.mark.parametrize(("dtype", "lossy"), [("float16", ("model.layers.1.mlp.down_proj",)), ("float32", ())])
def test_the_description_names_layers_that_the_dtype_of_the_model_cannot_hold(dtype, lossy):
    model = tiny_model().to(getattr(torch, dtype))
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data * 1e-6
    pql.quantize_model(model, CONFIGS["aqlm"], progress=False)
    assert describe_model(model).lossy_in_model_dtype == lossy


def test_fields_that_are_changed_outside_do_not_reach_the_config():
    config = QuantlayersConfig.from_model(pql.quantize_model(tiny_model(), CONFIGS["quantlayers"], progress=False))
    config.to_dict()["modules"].clear()
    assert config.to_dict()["modules"]
