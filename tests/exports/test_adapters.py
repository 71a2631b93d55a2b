"""Adapters beside an exported base, in each engine's form."""

import json

import numpy as np
import pytest
import torch
from integrations.tiny import token_ids
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.lora.base_fingerprint import AnotherBaseWarning

from . import decoders
from .models import quantized


def peft_model(family="llama", **fields):
    torch.manual_seed(0)
    config = LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | fields))
    model = get_peft_model(quantized(family), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.05)
    return model


def saved_adapter(folder, **fields):
    peft_model(**fields).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("format", ["humming", "dense"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"down_proj": 6}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
        {"task_type": TaskType.CAUSAL_LM, "init_lora_weights": "gaussian"},
    ],
)
def test_peft_reads_the_adapter_back_and_computes_the_same(tmp_path, format, fields):
    adapter = saved_adapter(tmp_path / "adapter", **fields)
    tuned = PeftModel.from_pretrained(quantized(), adapter)
    expected = tuned(token_ids()).logits
    pql.export(quantized(), tmp_path / "out", format, adapter=adapter, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out") if format == "dense" else quantized()
    loaded = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter")
    torch.testing.assert_close(loaded(token_ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_peft_model_may_be_given_as_the_adapter(tmp_path):
    model = peft_model()
    report = pql.export(quantized(), tmp_path / "out", "humming", adapter=model)
    assert report.serving_command.endswith(f"--lora-modules tuned={tmp_path / 'out'}/adapter")


def test_mlx_gets_its_own_form(tmp_path):
    adapter = saved_adapter(tmp_path / "adapter")
    report = pql.export(quantized(), tmp_path / "out", "mlx", adapter=adapter)
    assert report.serving_command.endswith(f"--adapter-path {tmp_path / 'out'}/adapter")
    folder = tmp_path / "out" / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["num_layers"] == 2
    assert config["lora_parameters"]["keys"] == ["mlp.down_proj", "self_attn.q_proj"]
    factors = decoders.tensors_of_file(folder / "adapters.safetensors")
    own = decoders.tensors_of_file(adapter / "adapter_model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        a, b = (factors[f"{name}.lora_{part}"].numpy() for part in "ab")
        A, B = (own[f"base_model.model.{name}.lora_{part}.weight"].numpy() for part in "AB")
        assert a.shape == (A.shape[1], 4)
        np.testing.assert_allclose(config["lora_parameters"]["scale"] * (a @ b).T, 2.0 * B @ A, atol=1e-6)


def test_a_correction_is_joined_with_the_users_adapter(tmp_path):
    adapter = saved_adapter(tmp_path / "adapter")
    expected = PeftModel.from_pretrained(quantized(), adapter)(token_ids()).logits
    folder = tmp_path / "out"
    pql.export(quantized(), folder, "compressed-tensors", adapter=adapter, approximate="adapter", dtype=torch.float32)
    base = quantized()
    tensors = decoders.tensors_of(folder)
    for name, layer in pql.quantized_modules(base).items():
        weight = torch.tensor(decoders.compressed_tensors_weight(tensors, name, 4), dtype=torch.float32)
        linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        linear.weight.data, linear.bias = weight, layer.bias
        base.set_submodule(name, linear)
    loaded = PeftModel.from_pretrained(base, folder / "adapter")
    torch.testing.assert_close(loaded(token_ids()).logits, expected, atol=1e-4, rtol=1e-4)


def test_low_rank_branches_become_an_adapter_and_are_folded_into_dense_weights(tmp_path):
    merged, _ = pql.merge_back(peft_model(), strategy="keep")
    expected = merged(token_ids()).logits
    pql.export(merged, tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(token_ids()).logits, expected, atol=1e-4, rtol=1e-4)
    pql.export(merged, tmp_path / "out", "humming", dtype=torch.float32)
    loaded = PeftModel.from_pretrained(quantized(), tmp_path / "out" / "adapter")
    torch.testing.assert_close(loaded(token_ids()).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"use_qalora": True, "qalora_group_size": 32}, "QA-LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"init_lora_weights": "olora"}, "changed the base"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices"),
    ],
)
@pytest.mark.parametrize("format", ["mlx", "humming"])
def test_adapters_that_engines_do_not_read_are_refused_by_name(tmp_path, fields, name, format):
    if "bias" in fields:
        (tmp_path / "adapter").mkdir()
        saved_adapter(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    else:
        saved_adapter(tmp_path / "adapter", **fields)
    with pytest.raises(NotImplementedError, match=rf"{name}.*Merge it first"):
        pql.export(quantized(), tmp_path / "out", format, adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_other_tuners_and_other_models_adapters_are_refused(tmp_path):
    folder = saved_adapter(tmp_path / "adapter")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"peft_type": "VERA"}))
    with pytest.raises(NotImplementedError, match="of the kind VERA"):
        pql.export(quantized(), tmp_path / "out", "mlx", adapter=folder)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="model has none of that name"):
        pql.export(quantized("gpt2"), tmp_path / "out", "dense", adapter=folder)
    with pytest.raises(FileNotFoundError, match="no adapter of PEFT"):
        pql.export(quantized(), tmp_path / "out", "mlx", adapter=tmp_path)


def test_an_adapter_of_another_base_is_told(tmp_path):
    adapter = saved_adapter(tmp_path / "adapter")
    assert "another quantized base" not in str(pql.export(quantized(), tmp_path / "same", "mlx", adapter=adapter))
    with pytest.warns(AnotherBaseWarning, match="trained on another quantized base"):
        report = pql.export(quantized(nbits=3), tmp_path / "other", "mlx", adapter=adapter)
    assert "trained on another quantized base" in str(report)


def test_merge_aware_adapters_are_to_be_merged(tmp_path):
    model = peft_model()
    pql.enable_merge_aware(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="through the rounding of its merge"):
        pql.export(quantized(), tmp_path / "out", "humming", adapter=tmp_path / "adapter")


@pytest.mark.parametrize("format", ["humming", "dense"])
@pytest.mark.parametrize(("rank", "largest"), [(1, 1), (4, 8), (16, 16), (17, 32)])
def test_vllm_is_told_the_smallest_rank_that_it_takes_for_the_adapter(tmp_path, format, rank, largest):
    adapter = saved_adapter(tmp_path / "adapter", r=rank)
    report = pql.export(quantized(), tmp_path / "out", format, adapter=adapter)
    assert f"--enable-lora --max-lora-rank {largest} --lora-modules tuned=" in report.serving_command


def test_a_rank_beyond_the_engines_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_quantlayers.exports.formats.format_base.ExportFormat.max_rank", 2)
    with pytest.raises(ValueError, match="rank 3, and vLLM takes 2"):
        pql.export(quantized(), tmp_path / "out", "compressed-tensors", approximate="adapter")
    assert not (tmp_path / "out").exists()
