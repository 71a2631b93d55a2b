"""A merge that changed nothing says so: an adapter that was not trained, or a base without quantized layers."""

import logging

import pytest
import torch
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model

import peft_quantlayers as pql

LORA = LoraConfig(target_modules=["q_proj", "v_proj"], r=2)


@pytest.mark.parametrize("strategy", ["auto", "requantize", "keep", "dense"])
def test_an_adapter_that_was_never_trained(strategy, caplog):
    model = get_peft_model(
        pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=4, group_size=32), progress=False), LORA
    )
    with caplog.at_level(logging.WARNING):
        _, report = pql.merge_back(model, strategy=strategy)
    assert "all 4 quantized layers with an adapter is zero" in report.recommendation
    assert report.recommendation in str(report)
    assert report.recommendation in caplog.text
    assert report.to_dict()["recommendation"] == report.recommendation


def test_a_trained_one_is_not_called_that():
    model = get_peft_model(
        pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=4, group_size=32), progress=False), LORA
    )
    torch.nn.init.normal_(model.base_model.model.model.layers[1].self_attn.q_proj.lora_B.default.weight)
    assert "is zero" not in (pql.merge_back(model)[1].recommendation or "")


def test_a_float_base(caplog):
    model = get_peft_model(tiny_model(), LORA)
    with caplog.at_level(logging.WARNING):
        _, report = pql.merge_back(model)
    assert "no quantized layer" in str(report)
    assert "No quantized weight was merged" in caplog.text
