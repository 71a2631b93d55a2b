"""Whole models: what quantize_model, dequantize_model and save_model refuse, restore and leave alone."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["c_attn", "c_proj"], init_lora_weights=False)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=96)).eval()


def quantized_gpt2() -> GPT2LMHeadModel:
    return pql.quantize_model(gpt2(), HQQConfig(nbits=8, group_size=32), progress=False)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(6)[None]).logits


@pytest.mark.parametrize("how", ["in memory", "reloaded", "merged"])
def test_a_dequantized_gpt2_has_its_conv1d_layers_again_and_loads_as_a_plain_model(how, tmp_path):
    model = quantized_gpt2()
    if how == "reloaded":
        model.save_pretrained(tmp_path / "quantized")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    if how == "merged":
        model = get_peft_model(model, lora()).eval()
    expected = logits(model)
    model = pql.merge_back(model, strategy="dense")[0] if how == "merged" else pql.dequantize_model(model)
    assert type(model.transformer.h[0].attn.c_proj) is Conv1D
    torch.testing.assert_close(logits(model), expected)
    pql.save_model(model, tmp_path / "dense")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_a_model_with_adapters_is_neither_quantized_nor_saved_as_a_whole(tmp_path):
    model = get_peft_model(gpt2(), lora())
    with pytest.raises(ValueError, match="adapters"):
        pql.quantize_model(model, HQQConfig(), progress=False)
    adapted = quantized_gpt2()
    adapted.add_adapter(lora())
    for candidate in (model, adapted):
        with pytest.raises(ValueError, match="merge_back"):
            pql.save_model(candidate, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_overwriting_replaces_the_model_and_leaves_other_files(tmp_path):
    folder = tmp_path / "project"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "train.py").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("an old shard")
    model = quantized_gpt2()
    with pytest.raises(FileExistsError, match="other files stay"):
        pql.save_model(model, folder)
    pql.save_model(model, folder, overwrite=True)
    assert (folder / "sub" / "train.py").read_text() == "mine"
    assert [path.name for path in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        pql.save_model(model, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("config", [{"nbits": 4}, None], ids=["mapping", "none"])
def test_a_config_of_another_kind_is_refused_with_the_way_out(config):
    with pytest.raises(TypeError, match=r"HQQConfig\(\*\*fields\)"):
        pql.quantize_model(gpt2(), config)


def test_a_config_survives_its_own_json():
    config = HQQConfig(nbits=3, skip_modules=["a", "b.*"], overrides={"c": {"nbits": 8}})
    assert HQQConfig.from_dict(config.to_dict()) == config


def test_a_single_linear_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="from_linear"):
        pql.quantize_model(nn.Linear(64, 64), HQQConfig())


def test_fused_experts_that_stay_dense_are_said(caplog):
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.randn(2, 64, 64))

    model = nn.ModuleDict({"attention": nn.Linear(64, 64), "experts": Experts()})
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        pql.quantize_model(model, HQQConfig(), progress=False)
    assert "experts" in caplog.text


def test_codes_take_no_gradient_and_modules_to_save_says_so():
    model = quantized_gpt2()
    with pytest.raises(NotImplementedError, match=r"c_attn.*skip_modules"):
        model.requires_grad_(True)
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["c_fc"])
    with pytest.raises(NotImplementedError, match=r"c_fc.*modules_to_save"):
        get_peft_model(model, config)


@pytest.mark.parametrize("x", [torch.zeros(2, 63), torch.zeros(2, 64, dtype=torch.int64)], ids=["width", "integers"])
def test_a_wrong_input_is_refused_by_the_layers_name(x):
    with pytest.raises(ValueError, match=r"c_fc: expected a floating input of shape \(\.\.\., 64\)"):
        quantized_gpt2().transformer.h[0].mlp.c_fc(x)
