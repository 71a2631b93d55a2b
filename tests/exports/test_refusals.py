"""What cannot be exported is refused before anything is written, with the ways out."""

import json
import os
import shutil
import signal

import _tiny_models
import pytest
import torch
from every_method import METHODS, quick_config
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model

import peft_quantlayers as pql
from peft_quantlayers.exports import sharded_writer

from . import decoders
from .models import files_of, quantized
from .tokenizers_for_tests import llama_tokenizer, save_sentencepiece

FORMATS = sorted(pql.export_formats())


def refused(model, folder, format, match, *, error=ValueError, **options):
    with pytest.raises(error, match=match) as raised:
        pql.export(model, folder, format, **options)
    assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []
    return str(raised.value)


def test_every_format_says_what_it_holds_and_for_whom():
    for name, each in pql.export_formats().items():
        assert str(each).startswith(f"{name}: {each.holds}; for {each.engines[0]}")


def test_an_unknown_format_is_refused_with_the_nearest(tmp_path):
    refused(quantized(), tmp_path / "out", "compresed-tensors", "did you mean 'compressed-tensors'")
    refused(quantized(), tmp_path / "out", "MLX", "did you mean 'mlx'")


def test_an_activation_that_llama_cpp_does_not_have_for_the_family_is_refused(tmp_path):
    model = quantized()
    model.config.hidden_act = "gelu"
    refused(model, tmp_path / "out", "gguf", "llama.cpp computes llama with silu, and .*hidden_act='gelu'")


@pytest.mark.parametrize(
    ("engine", "formats"),
    [
        ("vllm", "'humming' and 'compressed-tensors' and 'gptq' and 'awq'"),
        ("SGLang", "'humming' and 'compressed-tensors'"),
        ("llama.cpp", "'gguf'"),
        ("lm_studio", "'gguf'"),
        ("mlx-lm", "'mlx'"),
        ("onnxruntime", "'onnx'"),
    ],
)
def test_the_name_of_an_engine_is_refused_with_the_formats_that_it_reads(tmp_path, engine, formats):
    said = refused(quantized(), tmp_path / "out", engine, f"{engine} is an engine, which reads ")
    assert all(name in said for name in formats.split(" and "))
    assert "did you mean" not in said


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq", "awq"])
def test_float_zeros_are_refused_with_all_ways_out(tmp_path, format):
    said = refused(quantized(), tmp_path / "out", format, "its zeros are no integers from 0 to 15")
    for way in ("approximate='adapter'", "approximate='requantize'", "format='mlx'", "format='humming'"):
        assert way in said
    assert ("approximate='8bit'" in said) == (format != "awq")
    assert "and 11 more" in said


def test_groups_that_a_reader_does_not_take_are_refused(tmp_path):
    said = refused(quantized(group_size=16), tmp_path / "out", "mlx", "groups of 32, 64, 128 and multiples")
    assert "format='humming'" in said
    assert "format='mlx'" not in said


def test_groups_along_the_outputs_are_refused(tmp_path):
    said = refused(quantized(axis=0), tmp_path / "out", "mlx", "no place for groups along the outputs")
    assert "format='hqq'" in said
    assert "format='dense'" in said


@pytest.mark.usefixtures("toy_method")
@pytest.mark.parametrize("method", [name for name in METHODS if name != "hqq"])
def test_other_methods_are_refused_where_codes_are_no_integers(tmp_path, method):
    model = quantized(config=quick_config(method))
    said = refused(model, tmp_path / "out", "humming", f"has no place for {method} weights")
    assert "format='dense'" in said


def test_transposed_modules_are_refused_where_readers_turn_them_again(tmp_path):
    for format in ("mlx", "humming", "gptq", "awq", "compressed-tensors", "hqq"):
        refused(quantized("gpt2", integer_zero=True), tmp_path / "out", format, "Conv1D")


@pytest.mark.parametrize("format", ["humming", "compressed-tensors", "awq"])
def test_a_dense_part_of_what_engines_fuse_is_refused(tmp_path, format):
    model = quantized(integer_zero=True, skip_modules=["k_proj"])
    said = refused(model, tmp_path / "out", format, r"self_attn.k_proj as one layer, and model.*k_proj is dense")
    assert "format='mlx'" in said


def test_one_width_for_all_layers(tmp_path):
    model = quantized(integer_zero=True, overrides={"mlp.*": {"nbits": 8}})
    said = refused(model, tmp_path / "out", "gptq", "one width and group size for all layers")
    assert "format='compressed-tensors'" in said


def test_a_dense_model_has_nothing_for_formats_of_quantized_layers(tmp_path):
    refused(tiny_model(), tmp_path / "out", "mlx", "no quantized layers.*quantize_model")
    assert pql.export(tiny_model(), tmp_path / "out", "dense").layers == ()


def test_approximations_that_a_format_does_not_have_are_refused(tmp_path):
    refused(quantized(), tmp_path / "out", "mlx", "takes none", approximate="8bit")
    refused(quantized(), tmp_path / "out", "awq", "takes adapter, requantize", approximate="8bit")
    refused(quantized(), tmp_path / "out", "gptq", "did you mean 'adapter'", approximate="adaptor")
    refused(quantized(), tmp_path / "out", "mlx", 'are for approximate="requantize"', calibration="text")


def test_numbers_that_the_dtype_cannot_hold_are_refused(tmp_path):
    model = quantized()
    model.model.norm.weight.data[0] = 1e6
    refused(model, tmp_path / "out", "humming", "model.norm.weight holds numbers as large as 1e")


def test_wrong_kinds_of_arguments_are_refused(tmp_path):
    model = quantized()
    refused("no/such/folder", tmp_path / "out", "mlx", "no folder", error=FileNotFoundError)
    refused(3, tmp_path / "out", "mlx", "a model or the folder of one", error=TypeError)
    refused(torch.nn.Linear(2, 2), tmp_path / "out", "mlx", "transformers models", error=TypeError)
    refused(model, tmp_path / "out", "mlx", "dtype must be", error=TypeError, dtype="float16")
    refused(model, tmp_path / "out", "mlx", "tokenizer must be", error=TypeError, tokenizer=3)
    refused(model, tmp_path / "out", "mlx", "text must be", error=TypeError, text=3)
    refused(model, tmp_path / "out", "mlx", "no tokenizer", error=FileNotFoundError, text="words")
    refused(model, tmp_path / "out", "mlx", "adapter must be", error=TypeError, adapter=3)
    with pytest.raises(TypeError, match="destination must be a path"):
        pql.export(model, None, "mlx")


def test_a_folder_that_holds_files_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        pql.export(quantized(), tmp_path / "out", "mlx")
    assert files_of(tmp_path / "out") == {"mine.txt"}
    pql.export(quantized(), tmp_path / "out", "mlx", overwrite=True)
    assert {"mine.txt", "model.safetensors", "config.json"} <= files_of(tmp_path / "out")


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused(quantized(), tmp_path / "out", "mlx", "free there", error=OSError)


def test_an_error_while_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("the disk burns")

    monkeypatch.setattr("peft_quantlayers.exports.sharded_writer.write_safetensors", fail)
    refused(quantized(), tmp_path / "out", "mlx", "the disk burns", error=RuntimeError)


def test_a_kill_in_the_middle_leaves_nothing_half_written(tmp_path):
    model = quantized()
    pid = os.fork()
    if pid == 0:
        sharded_writer.write_safetensors = lambda *args, **kwargs: os.kill(os.getpid(), signal.SIGKILL)
        pql.export(model, tmp_path / "out", "mlx")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    pql.export(model, tmp_path / "out", "mlx")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # what the kill left is gone


def test_a_model_with_adapters_is_refused(tmp_path):
    model = get_peft_model(quantized(), LoraConfig(target_modules=["q_proj"]))
    refused(model, tmp_path / "out", "mlx", "carries PEFT adapters.*merge_back")


def test_what_was_written_says_how_it_is_served(tmp_path):
    report = pql.export(quantized(), tmp_path / "out", "mlx")
    assert report.serving_command == f"mlx_lm.server --model {tmp_path / 'out'}"
    assert report.serving_command in (tmp_path / "out" / "README.md").read_text()
    saved = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert saved["serving_command"] == report.serving_command
    assert len(saved["layers"]) == 14
    assert saved["is_exact"] is True
    assert report.serving_command in str(report)
    assert "no chat template" in str(report)
    assert report.n_bytes > sum(tensor.nbytes for tensor in decoders.tensors_of(tmp_path / "out").values())


@pytest.mark.parametrize(
    ("class_name", "kind"),
    [("T5ForConditionalGeneration", "an encoder-decoder"), ("LlavaForConditionalGeneration", "vision_config")],
)
def test_models_that_are_no_decoders_of_text_are_refused_by_what_they_are(tmp_path, class_name, kind):
    model = pql.quantize_model(_tiny_models.tiny_model(class_name), pql.HQQConfig(group_size=32), progress=False)
    for format in ("mlx", "humming", "gguf"):
        if format != "gguf" or has_converter():
            said = refused(model, tmp_path / "out", format, kind, tokenizer=llama_tokenizer())
            assert "format='dense'" in said
    loaded = type(model)
    pql.export(model, tmp_path / "dense", "dense")
    inputs = _tiny_models.tiny_inputs(model)
    with torch.no_grad():
        expected = _tiny_models.first_float(model(**inputs))
        found = _tiny_models.first_float(loaded.from_pretrained(tmp_path / "dense")(**inputs))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def has_converter():
    try:
        pql.export_formats()["gguf"].check_installation()
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("format", ["mlx", "dense"])
def test_experts_that_are_dense_stay_so(tmp_path, format):
    model = _tiny_models.tiny_model("MixtralForCausalLM")
    pql.quantize_model(model, pql.HQQConfig(group_size=32, skip_modules=["experts"]), progress=False)
    report = pql.export(model, tmp_path / "out", format)
    assert report.is_exact
    experts = [name for name in decoders.tensors_of(tmp_path / "out") if ".experts." in name]
    assert experts
    assert not any(name.endswith("scales") for name in experts)


def test_files_of_a_tokenizers_folder_are_copied_as_they_are(tmp_path):
    save_sentencepiece(tmp_path / "tokenizer", "some words to learn from, and some more of them " * 50, 280)
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"temperature": 0.123}')
    model = quantized()
    model.save_pretrained(tmp_path / "saved")
    own = (tmp_path / "saved" / "generation_config.json").read_text()
    pql.export(tmp_path / "saved", tmp_path / "out", "mlx", tokenizer=tmp_path / "tokenizer")
    assert {"tokenizer.model", "tokenizer_config.json"} <= files_of(tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == own
