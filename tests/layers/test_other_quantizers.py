"""A model that another library has quantized is refused before anything is changed."""

import pytest
import torch
from integrations.tiny import saved_tiny_model, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import peft_quantlayers as pql

CONFIG = pql.HQQConfig(nbits=4, group_size=16)


def refused(model: nn.Module, said: str) -> None:
    modules = list(model.modules())
    with pytest.raises(ValueError, match=rf"quantized by another method already \({said}.*not changed"):
        pql.quantize_model(model, CONFIG, progress=False)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_bitsandbytes_with_modules_that_it_skipped(tmp_path):
    pytest.importorskip("bitsandbytes", reason="an optional dependency")
    folder = saved_tiny_model(tmp_path)
    skipped = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["q_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=skipped)
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    refused(model, "bitsandbytes")


def test_a_layer_of_bitsandbytes_that_transformers_does_not_know_of():
    bnb = pytest.importorskip("bitsandbytes", reason="an optional dependency")
    model = tiny_model()
    old = model.model.layers[0].mlp.up_proj
    new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False)
    new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False)
    model.model.layers[0].mlp.up_proj = new.to("cpu")
    refused(model, r"model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32])
def test_integer_parameters_of_an_unknown_quantizer(dtype):
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(4, 4, dtype=dtype), requires_grad=False)

    refused(nn.Sequential(nn.Linear(32, 32), Packed()), "1.qweight, of a Packed, is torch.")


@pytest.mark.parametrize("as_dict", [True, False])
def test_a_config_that_says_so(as_dict):
    model = tiny_model()
    config = BitsAndBytesConfig(load_in_8bit=True)
    model.config.quantization_config = config.to_dict() if as_dict else config
    refused(model, "bitsandbytes")


def test_our_own_layers_are_no_obstacle():
    model = tiny_model()
    pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=16, skip_modules=["down_proj"]), progress=False)
    with pytest.raises(ValueError, match="quantized already"):  # to another spec
        pql.quantize_model(model, pql.HQQConfig(nbits=3, group_size=16), progress=False)
    pql.quantize_model(model, CONFIG, progress=False)
    assert isinstance(model.model.layers[0].mlp.down_proj, pql.QuantizedLinear)
