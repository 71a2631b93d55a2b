"""Exported models in the engines' own readers, which compute what the quantized model does."""

import importlib.util

import export_readers
import numpy as np
import pytest
import torch
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model

import peft_quantlayers as pql

from . import decoders
from .models import quantized, readable

needs_mlx = pytest.mark.skipif(
    not importlib.util.find_spec("mlx_lm"), reason="needs mlx-lm: pip install 'mlx-lm[cpu]'"
)
needs_compressed_tensors = pytest.mark.skipif(
    not importlib.util.find_spec("compressed_tensors"),
    reason="needs compressed-tensors: pip install compressed-tensors",
)
IDS = torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(1))


def model_of(family, **fields):
    return (readable if family in ("gemma3", "phi3") else quantized)(family, **fields)


def logits(model):
    with torch.no_grad():
        return model(IDS[None]).logits[0].numpy()


def assert_mlx_computes(expected, folder, adapter=None):
    found = export_readers.mlx(str(folder), IDS.numpy(), adapter)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@needs_mlx
@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gemma3", "phi3"])
def test_mlx_computes_what_the_quantized_model_does(tmp_path, family):
    model = model_of(family)
    pql.export(model, tmp_path / "out", "mlx")
    assert_mlx_computes(logits(model), tmp_path / "out")


@needs_mlx
@pytest.mark.parametrize("nbits", [1, 2, 3, 5, 6, 8])
def test_mlx_reads_every_width(tmp_path, nbits):
    model = quantized(nbits=nbits)
    pql.export(model, tmp_path / "out", "mlx")
    assert_mlx_computes(logits(model), tmp_path / "out")


@needs_mlx
def test_mlx_reads_mixed_widths_and_dense_layers(tmp_path):
    model = quantized(
        overrides={"layers.1.*": {"nbits": 8}, "o_proj": {"nbits": 3, "group_size": 64}}, skip_modules=["up_proj"]
    )
    pql.export(model, tmp_path / "out", "mlx")
    assert_mlx_computes(logits(model), tmp_path / "out")


@needs_mlx
@pytest.mark.parametrize("theta", [123456.0, 10000.0])
def test_mlx_takes_the_models_own_rope_base(tmp_path, theta):
    model = tiny_model()
    model.config.rope_parameters["rope_theta"] = theta
    model = type(model)(model.config).eval()  # the angles are computed once
    pql.quantize_model(model, pql.HQQConfig(group_size=32), progress=False)
    pql.export(model, tmp_path / "out", "mlx")
    assert_mlx_computes(logits(model), tmp_path / "out")


@needs_mlx
@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("targets", ["all-linear", ["o_proj", "down_proj"]])
def test_mlx_reads_the_adapter_beside_it(tmp_path, family, targets):
    tuned = get_peft_model(model_of(family), LoraConfig(r=4, lora_alpha=6, target_modules=targets))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    pql.export(model_of(family), tmp_path / "out", "mlx", adapter=tuned)
    assert np.abs(logits(tuned) - logits(model_of(family))).max() > 0.01
    assert_mlx_computes(logits(tuned), tmp_path / "out", str(tmp_path / "out" / "adapter"))


@needs_compressed_tensors
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "mistral"])
def test_transformers_reads_compressed_tensors(tmp_path, family):
    model = model_of(family, integer_zero=True)
    pql.export(model, tmp_path / "out", "compressed-tensors", dtype=torch.float32)
    found = export_readers.compressed_tensors(str(tmp_path / "out"), IDS.numpy(), None)
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@needs_compressed_tensors
@pytest.mark.parametrize("nbits", [2, 3, 5, 6, 8])
def test_compressed_tensors_of_every_width(tmp_path, nbits):
    model = quantized(nbits=nbits, integer_zero=True)
    pql.export(model, tmp_path / "out", "compressed-tensors", dtype=torch.float32)
    found = export_readers.compressed_tensors(str(tmp_path / "out"), IDS.numpy(), None)
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@needs_compressed_tensors
def test_transformers_loads_symmetric_codes_as_they_are(tmp_path):
    model = quantized(integer_zero=True)
    for layer in pql.quantized_modules(model).values():
        layer.quantized_weight.tensors["zero"].fill_(8)
    pql.export(model, tmp_path / "out", "compressed-tensors", dtype=torch.float32)
    found = export_readers.transformers(str(tmp_path / "out"), IDS.numpy(), None)
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@needs_compressed_tensors
def test_the_adapter_of_rounded_zeros_in_transformers_and_peft(tmp_path):
    model = quantized()
    pql.export(model, tmp_path / "out", "compressed-tensors", approximate="adapter", dtype=torch.float32)
    plain = export_readers.compressed_tensors(str(tmp_path / "out"), IDS.numpy(), None)
    corrected = export_readers.compressed_tensors(
        str(tmp_path / "out"), IDS.numpy(), str(tmp_path / "out" / "adapter")
    )
    expected = logits(model)
    np.testing.assert_allclose(corrected, expected, atol=1e-5)
    assert np.abs(plain - expected).max() > 0.01


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5, 6, 8])
def test_hummings_own_schema_accepts_the_tensors(tmp_path, nbits):
    schema_module = pytest.importorskip(
        "humming.schema.humming",
        reason="needs the schemas of humming: pip install --no-deps humming-kernels cuda-bindings",
    )
    model = quantized(nbits=nbits)
    pql.export(model, tmp_path / "out", "humming")
    schema = schema_module.HummingWeightSchema.from_config(decoders.config_of(tmp_path / "out")["quantization_config"])
    tensors = decoders.tensors_of(tmp_path / "out")
    for name, layer in pql.quantized_modules(model).items():
        own = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        schema.validate_tensors(own, layer.out_features, layer.in_features, torch.float16)
        assert {"weight", "weight_scale", "zero_point"} <= own.keys()
