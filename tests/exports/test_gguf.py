"""GGUF files, made by llama.cpp's own converter, read by the gguf package and by transformers."""

import importlib.util

import export_demo
import export_readers
import numpy as np
import pytest
import torch
from _tiny_decoders import SIZES
from demo_model import demo_model_folder
from llama_cpp_converter import ensure_converter
from peft import LoraConfig, get_peft_model

import peft_quantlayers as pql
from peft_quantlayers.exports.gguf_blocks import affine_blocks, affine_weight, eight_bit_blocks
from peft_quantlayers.exports.stand_ins import rows_of_stand_in, stand_in
from peft_quantlayers.exports.uniform_grid import uniform_grid
from peft_quantlayers.methods import get_method

from .converters import in_a_child  # noqa: F401
from .models import files_of, readable
from .tokenizers_for_tests import llama_tokenizer, save_sentencepiece

needs_llama_cpp = pytest.mark.skipif(
    not importlib.util.find_spec("xllamacpp"), reason="needs llama.cpp: pip install xllamacpp"
)
gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

TEXT = "\n".join(f"the {index} quick brown foxes jump over {index * 7} lazy dogs by the river" for index in range(300))


@pytest.fixture(autouse=True, scope="module")
def _converter():
    ensure_converter()


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
def test_a_stand_in_tells_the_number_of_each_row(dtype, shape):
    numbers = 300_000_000 + torch.arange(shape[0])
    weight = stand_in(numbers, shape[1], dtype)
    order = torch.randperm(shape[0])
    assert torch.equal(rows_of_stand_in(weight[order].float()), numbers[order])
    assert rows_of_stand_in(torch.randn(4, 32)) is None
    for changed in (weight * 1.0, weight[:, torch.randperm(shape[1])], weight.clone()):
        changed = changed.float()
        changed[:, 0] += 1
        if rows_of_stand_in(weight.float()) is not None and (changed[:, 7] == 127).all():
            with pytest.raises(ValueError, match="changes the weights"):
                rows_of_stand_in(changed)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama, and the folder that it was exported to; converting takes seconds."""
    folder = tmp_path_factory.mktemp("llama") / "out"
    model = readable("llama")
    return model, folder, exported(model, folder)


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits[0]


def assert_readers_compute_the_same(model, folder):
    """transformers' GGUF loader up to float16 of the minima; llama.cpp, if it is there, up to 8-bit activations."""
    ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = logits(model, ids)
    found = export_readers.gguf_transformers(str(folder), ids[0].numpy(), None)
    assert np.abs(expected.numpy() - found).max() < 5e-3 * expected.abs().max()
    if importlib.util.find_spec("xllamacpp"):
        assert_llama_cpp_computes(expected, folder, ids)


def assert_llama_cpp_computes(expected, folder, ids, adapter=None):
    found = torch.tensor(export_readers.llama_cpp(str(folder), ids[0].numpy(), adapter))
    assert kl(expected, found) < 1e-4


def kl(expected, found):
    expected, found = expected.log_softmax(-1), found.log_softmax(-1)
    return (expected.exp() * (expected - found)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["llama-tied", "mistral", "gemma3", "phi3"])
def test_readers_compute_what_the_quantized_model_does(tmp_path, family):
    model = readable(family)
    report = exported(model, tmp_path / "out")
    assert report.is_exact
    assert {(layer.stored_as, layer.bits_after) for layer in report.layers} == {("Q4_1", 5.0)}
    assert_readers_compute_the_same(model, tmp_path / "out")


def test_every_layer_is_a_reordering_of_its_grid(llama):
    model, folder, report = llama
    assert report.is_exact
    found = [
        dequantized(tensor)
        for tensor in tensors_of(folder / "model.gguf").values()
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_1
    ]
    assert len(found) == len(pql.quantized_modules(model)) == 14
    for layer in pql.quantized_modules(model).values():
        own = np.sort(layer.dequantize(torch.float32).numpy(), axis=0)
        assert any(each.shape == own.shape and np.abs(np.sort(each, axis=0) - own).max() < 1e-3 for each in found)
    assert_readers_compute_the_same(model, folder)


def test_each_layer_has_the_blocks_that_hold_it(tmp_path):
    overrides = {
        "q_proj": {"nbits": 2},
        "k_proj": {"nbits": 5},
        "v_proj": {"nbits": 6},
        "o_proj": {"group_size": 64},
        "gate_proj": {"group_size": None},
        "up_proj": {"nbits": 8, "group_size": 16},
    }
    model = readable("llama", overrides=overrides)
    report = exported(model, tmp_path / "out")
    found = {layer.name.rpartition(".")[2]: (layer.stored_as, layer.bits_after) for layer in report.layers}
    assert found == {
        "q_proj": ("Q4_1", 5.0), "k_proj": ("Q5_1", 6.0), "v_proj": ("Q8_0", 8.5), "o_proj": ("Q4_1", 5.0),
        "gate_proj": ("Q4_1", 5.0), "up_proj": ("Q8_0", 8.5), "down_proj": ("Q4_1", 5.0),
    }  # fmt: skip
    assert report.relative_error < 0.01
    assert "rounded to 8 bits" in str(report)
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_1
    ids = torch.randint(3, 300, (1, 24))
    found = export_readers.gguf_transformers(str(tmp_path / "out"), ids[0].numpy(), None)
    assert np.abs(logits(model, ids).numpy() - found).max() < 0.02


@needs_llama_cpp
def test_llama_cpp_writes_text_as_the_demo_has_it(llama):
    _, folder, _ = llama
    assert isinstance(export_demo.text_from_llama_cpp(folder / "model.gguf", "w1 w2 w3", n_tokens=4), str)


@needs_llama_cpp
@pytest.mark.real_model  # whose tokenizer llama.cpp knows by its rules for splitting
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_transposed_weights_and_normed_queries_follow(tmp_path, family):
    model = readable(family, sizes={"vocab_size": 49152})
    report = pql.export(model, tmp_path / "out", "gguf", tokenizer=demo_model_folder())
    assert report.is_exact
    ids = torch.randint(3, 300, (1, 24))
    assert_llama_cpp_computes(logits(model, ids), tmp_path / "out", ids)


@needs_llama_cpp
def test_llama_cpp_reads_the_adapter_beside_it(tmp_path):
    base = readable("llama")
    tuned = get_peft_model(readable("llama"), LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    report = exported(base, tmp_path / "out", adapter=tuned)
    adapter = tmp_path / "out" / "adapter.gguf"
    assert report.serving_command == f"llama-server -m {tmp_path / 'out'}/model.gguf --lora {adapter}"
    ids = torch.randint(3, 300, (1, 24))
    expected = logits(tuned, ids)
    assert kl(expected, logits(base, ids)) > 1e-4
    assert_llama_cpp_computes(expected, tmp_path / "out", ids, str(adapter))


def test_an_adapter_on_a_dense_layer_is_refused(tmp_path):
    tuned = get_peft_model(readable("llama"), LoraConfig(r=4, target_modules=["lm_head"]))
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(NotImplementedError, match=r"layer lm_head, which is not quantized.*Merge the adapter first"):
        exported(readable("llama"), tmp_path / "out", adapter=tmp_path / "adapter")
    assert not (tmp_path / "out").exists()


def test_metadata_and_tokenizer_are_the_converters(llama):
    _, folder, report = llama
    fields = {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.rope.freq_base"] == 10000.0
    assert len(fields["tokenizer.ggml.tokens"]) == 320
    assert "message" in fields["tokenizer.chat_template"]
    assert files_of(folder) >= {"model.gguf", "README.md", "export_report.json", "tokenizer.json"}
    assert not any(path.name.startswith(".") for path in folder.parent.iterdir())
    assert report.serving_command == f"llama-server -m {folder}/model.gguf"


def test_weights_without_a_grid_go_into_eight_bits(tmp_path):
    model = readable(config=pql.AQLMConfig(nbits_per_codebook=4))
    with pytest.raises(ValueError, match=r"no place for aqlm weights(.|\n)*approximate='8bit'"):
        exported(model, tmp_path / "out")
    report = exported(model, tmp_path / "out", approximate="8bit")
    assert report.relative_error < 0.01


def test_requantizing_onto_llama_cpps_grid(tmp_path):
    model = readable("llama", group_size=16)
    with pytest.raises(ValueError, match="groups of multiples of 32, not of 16"):
        exported(model, tmp_path / "out")
    report = exported(model, tmp_path / "out", approximate="requantize")
    assert {layer.stored_as for layer in report.layers} == {"Q4_1"}
    assert 0.01 < report.relative_error < 0.2


def test_a_missing_tokenizer_and_a_missing_converter_are_told(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pass tokenizer="):
        pql.export(readable("llama"), tmp_path / "out", "gguf")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ImportError, match="pip install --no-deps --target"):
        exported(readable("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_converter_does_not_know_is_told_in_its_words(tmp_path):
    from transformers import HeliumConfig, HeliumForCausalLM

    model = HeliumForCausalLM(HeliumConfig(**SIZES, head_dim=16))
    pql.quantize_model(model, pql.HQQConfig(group_size=32), progress=False)
    with pytest.raises(ValueError, match=r"HeliumForCausalLM is not supported"):
        exported(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
