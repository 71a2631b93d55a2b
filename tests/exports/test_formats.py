"""What each format writes, decoded in numpy from the readers' specifications."""

import json
import re

import numpy as np
import pytest
import torch
from every_method import all_methods, quick_config
from integrations.tiny import token_ids
from transformers import AutoConfig, AutoModelForCausalLM

import peft_quantlayers as pql

from . import decoders
from .models import files_of, quantized, weights

FLOAT_ZERO = ("mlx", "humming")


def decoded(folder, name, format, nbits, columns):
    tensors = decoders.tensors_of(folder)
    if format == "mlx":
        return decoders.mlx_weight(tensors, name, nbits, columns)
    if format == "humming":
        return decoders.humming_weight(tensors, name, nbits, columns)
    if format == "compressed-tensors":
        return decoders.compressed_tensors_weight(tensors, name, nbits)
    if format == "gptq":
        return decoders.gptq_weight(tensors, name, nbits)
    return decoders.awq_weight(tensors, name)


def assert_weights_are(model, folder, format, nbits=4, *, tolerance=1e-6):
    for name, weight in weights(model).items():
        found = decoded(folder, name, format, nbits, weight.shape[1])
        np.testing.assert_allclose(found, weight.double().numpy(), atol=tolerance, rtol=0, err_msg=name)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "mistral", "gemma3", "qwen2"])
@pytest.mark.parametrize("format", FLOAT_ZERO)
def test_float_zeros_are_held_exactly(tmp_path, family, format):
    model = quantized(family)
    report = pql.export(model, tmp_path / "out", format)
    assert report.is_exact
    assert len(report.layers) == 14
    assert_weights_are(model, tmp_path / "out", format)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("format", FLOAT_ZERO)
def test_every_width_is_held_exactly(tmp_path, nbits, format):
    model = quantized(nbits=nbits)
    report = pql.export(model, tmp_path / "out", format)
    assert report.is_exact
    assert report.bits[1] == pytest.approx(nbits + (2 * (32 if format == "mlx" else 16)) / 32)
    assert_weights_are(model, tmp_path / "out", format, nbits)


@pytest.mark.parametrize("nbits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_integer_zeros_are_held_exactly(tmp_path, nbits, format):
    if format == "awq":
        nbits = 4
    if format == "gptq" and nbits in (5, 6):
        with pytest.raises(ValueError, match=f"gptq holds 2, 3, 4, 8 bits per code, not {nbits}"):
            pql.export(quantized(nbits=nbits, integer_zero=True), tmp_path / "out", format)
        return
    model = quantized(nbits=nbits, integer_zero=True)
    report = pql.export(model, tmp_path / "out", format, dtype=torch.float32)
    assert report.relative_error < 1e-7
    assert_weights_are(model, tmp_path / "out", format, nbits)


def test_symmetric_codes_need_no_zeros(tmp_path):
    model = quantized(integer_zero=True)
    for layer in pql.quantized_modules(model).values():
        layer.quantized_weight.tensors["zero"].fill_(8)
    pql.export(model, tmp_path / "ct", "compressed-tensors")
    assert not any("zero_point" in name for name in decoders.tensors_of(tmp_path / "ct"))
    (group,) = decoders.config_of(tmp_path / "ct")["quantization_config"]["config_groups"].values()
    assert group["weights"]["symmetric"] is True
    assert_weights_are(model, tmp_path / "ct", "compressed-tensors")
    pql.export(model, tmp_path / "gptq", "gptq")
    assert decoders.config_of(tmp_path / "gptq")["quantization_config"]["sym"] is True


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_eight_bits_hold_float_zeros_nearly(tmp_path, format):
    model = quantized()
    report = pql.export(model, tmp_path / "out", format, approximate="8bit", text=token_ids()[0])
    assert not report.is_exact
    assert 0.001 < report.relative_error < 0.02
    assert 0 < report.kl < 1e-3
    largest = max(layer.scale.max().item() for layer in pql.quantized_modules(model).values())
    assert_weights_are(model, tmp_path / "out", format, 8, tolerance=largest / 17)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_an_adapter_restores_rounded_zeros(tmp_path, format):
    model = quantized()
    folder = tmp_path / "out"
    report = pql.export(model, folder, format, approximate="adapter", dtype=torch.float32)
    assert report.relative_error < 1e-6
    assert "--lora-modules" in report.serving_command
    factors = decoders.tensors_of_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 3  # groups of 32 of 96 inputs
    for name, weight in weights(model).items():
        A, B = (factors[f"base_model.model.{name}.lora_{part}.weight"].double().numpy() for part in "AB")
        found = decoded(folder, name, format, 4, weight.shape[1]) + B @ A
        np.testing.assert_allclose(found, weight.double().numpy(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_requantized_weights_have_zeros_that_are_codes(tmp_path, format):
    model = quantized()
    report = pql.export(model, tmp_path / "out", format, approximate="requantize")
    assert 0.01 < report.relative_error < 0.2
    float_model = quantized("llama", config=pql.HQQConfig(nbits=8, group_size=32))
    pql.dequantize_model(float_model)
    better = pql.export(model, tmp_path / "from-float", format, approximate="requantize", float_model=float_model)
    assert better.relative_error > 0


def test_weights_of_other_methods_are_requantized(tmp_path):
    model = quantized(config=pql.AQLMConfig(nbits_per_codebook=4))
    report = pql.export(model, tmp_path / "out", "compressed-tensors", approximate="requantize")
    assert {layer.stored_as for layer in report.layers} == {"4 bits in groups of 64", "4 bits in groups of 32"}
    assert 0.01 < report.relative_error < 0.3


def test_a_mixture_of_widths_tells_that_transformers_reads_one(tmp_path):
    model = quantized(integer_zero=True, overrides={"layers.1.*": {"nbits": 8}})
    report = pql.export(model, tmp_path / "out", "compressed-tensors")
    assert "transformers reads one width" in str(report)
    groups = decoders.config_of(tmp_path / "out")["quantization_config"]["config_groups"]
    assert {group["weights"]["num_bits"] for group in groups.values()} == {4, 8}
    tensors = decoders.tensors_of(tmp_path / "out")
    for name, weight in weights(model).items():
        nbits = pql.quantized_modules(model)[name].spec.nbits
        matching = [each for each in groups.values() if any(re.match(t[3:], name) for t in each["targets"])]
        assert [each["weights"]["num_bits"] for each in matching] == [nbits]
        found = decoders.compressed_tensors_weight(tensors, name, nbits)
        np.testing.assert_allclose(found, weight.double().numpy(), atol=1e-6, rtol=0)


def test_requantizing_with_calibration(tmp_path):
    text = torch.randint(3, 128, (512,), generator=torch.Generator().manual_seed(2))
    report = pql.export(
        quantized(), tmp_path / "out", "compressed-tensors", approximate="requantize",
        calibration=pql.Calibration(data=text, n_tokens=512, sequence_length=64),
    )  # fmt: skip
    assert 0.01 < report.relative_error < 0.3


@pytest.mark.parametrize("group_size", [64, None])
def test_large_groups_are_divided(tmp_path, group_size):
    model = quantized(group_size=group_size, skip_modules=["down_proj"])
    report = pql.export(model, tmp_path / "out", "mlx")
    assert report.is_exact
    assert {layer.stored_as for layer in report.layers} == {"4 bits in groups of 64"}
    assert_weights_are(model, tmp_path / "out", "mlx")


@pytest.mark.parametrize("format", FLOAT_ZERO)
def test_each_layer_may_have_its_own_width(tmp_path, format):
    model = quantized(overrides={"layers.1.*": {"nbits": 8}, "o_proj": {"nbits": 3}})
    pql.export(model, tmp_path / "out", format)
    config = decoders.config_of(tmp_path / "out")["quantization_config"]
    tensors = decoders.tensors_of(tmp_path / "out")
    for name, weight in weights(model).items():
        nbits = pql.quantized_modules(model)[name].spec.nbits
        found = getattr(decoders, f"{format}_weight")(tensors, name, nbits, weight.shape[1])
        np.testing.assert_allclose(found, weight.double().numpy(), atol=1e-6, rtol=0)
    if format == "mlx":
        assert config["bits"] == 4
        assert config["model.layers.0.self_attn.o_proj"] == {"bits": 3, "group_size": 32, "mode": "affine"}
    else:
        assert config["dtype"] == "uint4"
        assert config["dynamic"][r"+:model\.layers\.1\.self_attn\.qkv_proj$"] == {"dtype": "uint8", "group_size": 32}


def test_layers_that_engines_fuse_must_be_alike(tmp_path):
    model = quantized(overrides={"k_proj": {"nbits": 8}})
    with pytest.raises(ValueError, match=r"q_proj.*k_proj.*as one layer.*4 bits.*8 bits") as error:
        pql.export(model, tmp_path / "out", "humming")
    assert "format='mlx'" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3"])
@all_methods
def test_dense_files_load_in_transformers_and_compute_the_same(tmp_path, family, method):
    model = quantized(family, config=quick_config(method))
    report = pql.export(model, tmp_path / "out", "dense")
    assert report.relative_error < 1e-6
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not pql.quantized_modules(loaded)
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits, atol=1e-4, rtol=1e-4)


def test_half_precision_of_a_dense_model_is_reported(tmp_path):
    report = pql.export(quantized(), tmp_path / "out", "dense", dtype=torch.bfloat16)
    assert 1e-4 < report.relative_error < 4e-3
    assert {tensor.dtype for tensor in decoders.tensors_of(tmp_path / "out").values()} == {torch.bfloat16}
    assert decoders.config_of(tmp_path / "out")["dtype"] == "bfloat16"


@pytest.mark.parametrize("fields", [{}, {"nbits": 3}, {"nbits": 8}, {"nbits": 5}, {"axis": 0}, {"nbits": 2}])
def test_the_published_hqq_layout_is_read_by_the_hqq_package_and_by_us(tmp_path, fields):
    from hqq.core.quantize import HQQLinear as PackageLinear

    model = quantized(**fields)
    pql.export(model, tmp_path / "out", "hqq")
    tensors = decoders.tensors_of(tmp_path / "out")
    for name, weight in weights(model).items():
        layer = PackageLinear(None, None, compute_dtype=torch.float32, device="cpu", initialize=False)
        layer.load_state_dict(
            {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        )
        torch.testing.assert_close(layer.dequantize().float(), weight, atol=1e-6, rtol=1e-5)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


def test_the_published_aqlm_layout_is_read_by_us(tmp_path):
    model = quantized(config=pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=8))
    report = pql.export(model, tmp_path / "out", "aqlm")
    assert report.relative_error == 0
    assert decoders.config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "aqlm"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded(token_ids()).logits, model(token_ids()).logits)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_engines_find_the_rope_base_where_they_look(tmp_path, family):
    model = quantized(family)
    rope = model.config.rope_parameters
    theta = 123456.0
    (rope if "rope_theta" in rope else rope["full_attention"])["rope_theta"] = theta
    pql.export(model, tmp_path / "out", "dense")
    config = decoders.config_of(tmp_path / "out")
    assert config["rope_theta"] == theta
    assert config["rope_scaling"] is None
    assert config["torch_dtype"] == config["dtype"] == "float32"
    if family == "gemma3":
        assert config["rope_local_base_freq"] == rope["sliding_attention"]["rope_theta"]
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == rope


def test_scaled_ropes_are_told_in_both_forms(tmp_path):
    model = quantized()
    scaling = {"rope_type": "linear", "factor": 4.0}
    model.config.rope_parameters = {"rope_theta": 5e5, **scaling}
    pql.export(model, tmp_path / "out", "dense")
    config = decoders.config_of(tmp_path / "out")
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, scaling)
    assert AutoConfig.from_pretrained(tmp_path / "out").rope_parameters == {"rope_theta": 5e5, **scaling}


def test_bfloat16_models_keep_their_zeros(tmp_path):
    model = quantized(dtype=torch.bfloat16)
    report = pql.export(model, tmp_path / "out", "humming")
    assert report.relative_error < 1e-7
    assert decoders.config_of(tmp_path / "out")["dtype"] == "float16"
    rounded = pql.export(model, tmp_path / "bfloat16", "humming", dtype=torch.bfloat16)
    assert not rounded.is_exact


def test_a_folder_is_exported_as_the_model_in_memory_is(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path / "saved")
    pql.export(model, tmp_path / "memory", "mlx")
    pql.export(tmp_path / "saved", tmp_path / "folder", "mlx")
    first, second = (decoders.tensors_of(tmp_path / name) for name in ("memory", "folder"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)
    assert files_of(tmp_path / "memory") == files_of(tmp_path / "folder")


def test_a_published_folder_goes_through_the_same_door(tmp_path):
    model = quantized()
    pql.export(model, tmp_path / "hqq", "hqq")
    pql.export(tmp_path / "hqq", tmp_path / "mlx", "mlx")
    assert_weights_are(model, tmp_path / "mlx", "mlx")


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("peft_quantlayers.exports.sharded_writer.SHARD_BYTES", 40_000)
    model = quantized()
    pql.export(model, tmp_path / "out", "dense")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits, atol=1e-4, rtol=1e-4)
