"""ONNX and OpenVINO: graphs of the engines' own converters, read by the engines."""

import importlib.util
import sys

import export_readers
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

import peft_quantlayers as pql

from .converters import in_a_child  # noqa: F401
from .models import files_of, quantized, readable
from .tokenizers_for_tests import llama_tokenizer


def has(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


needs_onnx = pytest.mark.skipif(
    not has("onnxruntime", "onnxruntime_genai", "onnx_ir"),
    reason="needs ONNX Runtime: pip install 'peft_quantlayers[onnx]'",
)
needs_openvino = pytest.mark.skipif(
    not has("openvino", "openvino_tokenizers"), reason="needs OpenVINO: pip install 'peft_quantlayers[openvino]'"
)
FORMATS = [pytest.param("onnx", marks=needs_onnx), pytest.param("openvino", marks=needs_openvino)]
IDS = torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(1))
# Of each layer another width and group: one conversion shows them all.
MIXED = {
    "onnx": {
        "q_proj": {"nbits": 2}, "k_proj": {"nbits": 2}, "v_proj": {"nbits": 1},
        "o_proj": {"nbits": 3, "group_size": 64}, "gate_proj": {"nbits": 4, "group_size": 16},
        "up_proj": {"nbits": 8, "integer_zero": True}, "down_proj": {"nbits": 5, "integer_zero": True},
    },
    "openvino": {
        "q_proj": {"nbits": 1}, "k_proj": {"nbits": 2}, "v_proj": {"nbits": 3},
        "o_proj": {"nbits": 4, "group_size": 8}, "gate_proj": {"nbits": 5, "group_size": None},
        "up_proj": {"nbits": 6}, "down_proj": {"nbits": 8},
    },
}  # fmt: skip


@torch.no_grad()
def assert_computes(model, folder, format, *, atol=2e-5):
    found = getattr(export_readers, format)(str(folder), IDS.numpy(), None)
    np.testing.assert_allclose(found, model(IDS[None]).logits[0].numpy(), atol=atol)


def exported(model, folder, format, **options):
    return pql.export(model, folder, format, tokenizer=llama_tokenizer(), **options)


@pytest.mark.parametrize("format", FORMATS)
def test_widths_and_groups_are_held_exactly(tmp_path, format):
    model = quantized(overrides=MIXED[format])
    report = exported(model, tmp_path / "out", format)
    assert report.relative_error < 1e-6
    assert_computes(model, tmp_path / "out", format)
    files = {"tokenizer.json", "README.md", "export_report.json", "config.json"}
    files |= {"genai_config.json"} if format == "onnx" else {"openvino_tokenizer.xml", "openvino_detokenizer.bin"}
    assert files_of(tmp_path / "out") >= files
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


@needs_onnx
@pytest.mark.parametrize("family", ["qwen3", "mistral", "phi3"])
def test_onnx_runtime_computes_what_the_quantized_model_does(tmp_path, family):
    model = readable(family)
    assert exported(model, tmp_path / "out", "onnx").is_exact
    assert_computes(model, tmp_path / "out", "onnx")


@needs_openvino
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "phi3", "gpt2"])
def test_openvino_computes_what_the_quantized_model_does(tmp_path, family):
    model = readable(family)
    assert exported(model, tmp_path / "out", "openvino").is_exact
    assert_computes(model, tmp_path / "out", "openvino")


@needs_openvino
def test_half_precision_is_rounded_once_and_weights_stay_codes(tmp_path):
    import openvino

    model = quantized()
    report = pql.export(model, tmp_path / "out", "openvino", dtype=torch.float16)
    assert report.is_exact
    assert "openvino-genai needs a tokenizer" in str(report)
    assert report.bits[1] == 4 + 2 * 16 / 32
    assert_computes(model, tmp_path / "out", "openvino", atol=2e-3)
    compiled = openvino.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU").get_runtime_model()
    ports = [port for node in compiled.get_ops() for port in node.outputs()]
    kept = [port for port in ports if port.get_element_type() == openvino.Type.u4]
    assert len(kept) == len(pql.quantized_modules(model))
    size = (tmp_path / "out" / "openvino_model.bin").stat().st_size
    floats = sum(parameter.numel() for parameter in model.parameters() if parameter.is_floating_point())
    codes = sum(layer.in_features * layer.out_features for layer in pql.quantized_modules(model).values())
    assert size < 1.1 * (2 * floats + codes / 2)


@needs_onnx
def test_other_weights_are_requantized(tmp_path):
    format = "onnx"
    model = readable(config=pql.AQLMConfig(nbits_per_codebook=4))
    with pytest.raises(ValueError, match=r"no place for aqlm weights(.|\n)*approximate='requantize'"):
        exported(model, tmp_path / "out", format)
    report = exported(model, tmp_path / "out", format, approximate="requantize")
    assert {layer.stored_as.split(" in ")[0] for layer in report.layers} == {"4 bits"}
    assert 0.01 < report.relative_error < 0.3


def refused(model, folder, format, match, *, error=ValueError, **options):
    with pytest.raises(error, match=match) as raised:
        exported(model, folder, format, **options)
    assert not folder.exists()
    assert not any(path.name.startswith(".") for path in folder.parent.iterdir())
    return str(raised.value)


@needs_onnx
def test_float_zeros_of_wide_codes_go_into_no_onnx_file(tmp_path):
    said = refused(quantized(nbits=8), tmp_path / "out", "onnx", "its zeros are no integers from 0 to 255")
    assert "approximate='8bit'" in said
    assert "format='openvino'" in said
    report = exported(quantized(nbits=5), tmp_path / "out", "onnx", approximate="8bit")
    assert 0 < report.relative_error < 0.02


@needs_onnx
def test_what_the_builder_does_not_know_is_told_in_its_words(tmp_path):
    refused(readable("gpt2"), tmp_path / "out", "onnx", "it is a Conv1D")
    refused(
        quantized("falcon"),
        tmp_path / "out",
        "onnx",
        r"builder does not take this model(.|\n)*not currently supported",
    )


@needs_openvino
def test_a_model_whose_cache_is_none_of_keys_and_values_is_told(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=320, state_size=8)).eval()
    pql.quantize_model(model, pql.HQQConfig(group_size=32, on_misfit="dense"), progress=False)
    refused(model, tmp_path / "out", "openvino", "OpenVINO's converter does not take this model")


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_beside_a_model_is_refused(tmp_path, format):
    tuned = get_peft_model(quantized(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    match = r"an adapter is not written beside the model\. Merge the adapter first"
    refused(quantized(), tmp_path / "out", format, match, error=NotImplementedError, adapter=tuned)
    merged, _ = pql.merge_back(tuned, strategy="keep")
    refused(merged, tmp_path / "out", format, "a low-rank branch", error=NotImplementedError)
    refused(quantized(), tmp_path / "out", format, "not written in torch.bfloat16; use dtype", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("format", "package", "line"),
    [("onnx", "onnxruntime_genai", "pip install onnxruntime-genai"), ("openvino", "openvino", "pip install openvino")],
)
def test_a_missing_package_is_told_with_its_pip_line(tmp_path, monkeypatch, format, package, line):
    monkeypatch.setitem(sys.modules, package, None)
    refused(quantized(), tmp_path / "out", format, line, error=ImportError)
