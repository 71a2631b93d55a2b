"""Quantized embeddings in exported files: dequantized to the numbers that the model computes with, and said so."""

import pytest
import torch
from _tiny_models import first_float, tiny_inputs, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_quantlayers import HQQConfig, export, quantize_model, save_model

CONFIG = HQQConfig.for_export("mlx", quantize_embeddings=8)


@pytest.mark.parametrize("is_folder", [False, True])
@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM"])
def test_a_dense_export_has_the_rows_of_the_model_and_computes_the_same(name, is_folder, tmp_path):
    model = quantize_model(tiny_model(name), CONFIG, progress=False)
    with torch.no_grad():
        expected = first_float(model(**tiny_inputs(model)))
    source = model
    if is_folder:
        save_model(model, source := tmp_path / "saved")
    export(source, tmp_path / "dense", format="dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(dense.get_input_embeddings().weight, model.get_input_embeddings().dequantize())
    with torch.no_grad():
        torch.testing.assert_close(first_float(dense(**tiny_inputs(dense))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_format_of_grids_has_them_dense_with_a_line_in_the_report(name, is_folder, tmp_path):
    model = quantize_model(tiny_model(name), CONFIG, progress=False)
    source = model
    if is_folder:
        save_model(model, source := tmp_path / "saved")
    report = export(source, tmp_path / "mlx", format="mlx", dtype=torch.float32)
    assert any("Quantized embeddings are written dense" in note for note in report.notes)
    tensors = load_file(tmp_path / "mlx" / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], model.get_input_embeddings().dequantize())
    is_tied = name == "Gemma3ForCausalLM"
    assert ("lm_head.scales" in tensors) != is_tied
    assert ("lm_head" in {layer.name for layer in report.layers}) != is_tied


@pytest.mark.parametrize(("target", "spec"), [("gguf", {"symmetric": True, "group_size": 32}), ("awq", {})])
def test_a_head_of_its_own_lies_on_a_grid_of_the_target_where_it_has_one(target, spec):
    model = tiny_model("LlamaForCausalLM")
    quantize_model(model, HQQConfig.for_export(target, quantize_embeddings=8), progress=False)
    assert model.lm_head.spec.nbits == 8
    assert all(getattr(model.lm_head.spec, field) == value for field, value in spec.items())
    assert (model.lm_head.spec.export_target is None) == (not spec)
