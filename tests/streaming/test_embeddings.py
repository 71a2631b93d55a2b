"""Embedding tables from files to files: the bytes of quantize_model and save_model, one copy of what is tied."""

import json

import pytest
import torch
from _tiny_models import tiny_model
from programs import fork_server

import peft_quantlayers as pql
from peft_quantlayers.streaming import checkpoint_parts, processes, quantize_files
from streaming.test_calibrated import calibration_for
from streaming.test_quantize_checkpoint import assert_same, in_memory, saved

CONFIG = pql.HQQConfig(nbits=4, group_size=16, quantize_embeddings=8)
CLASSES = (
    "LlamaForCausalLM", "Gemma3ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM", "BertForMaskedLM",
    "MixtralForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
    "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration",
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)


@pytest.mark.parametrize("name", CLASSES)
def test_tables_are_written_as_in_memory(name, tmp_path):
    folder = saved(tmp_path / "float", name)
    pql.quantize_checkpoint(folder, tmp_path / "quantized", CONFIG, progress=False)
    assert_same(tmp_path / "quantized", in_memory(folder, tmp_path / "expected", CONFIG))


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_calibrated_too(name, tmp_path):
    folder = saved(tmp_path / "float", name)
    calibration = calibration_for(tiny_model(name))
    pql.quantize_checkpoint(folder, tmp_path / "quantized", CONFIG, calibration=calibration, progress=False)
    model = type(tiny_model(name)).from_pretrained(folder)
    pql.save_model(pql.quantize_model(model, CONFIG, calibration=calibration, progress=False), tmp_path / "expected")
    assert_same(tmp_path / "quantized", tmp_path / "expected")


@pytest.mark.parametrize("is_calibrated", [False, True])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(is_calibrated, tmp_path, monkeypatch):
    name = "Gemma3ForCausalLM"
    folder, calls = saved(tmp_path / "float", name), []
    options = {"progress": False, "calibration": calibration_for(tiny_model(name)) if is_calibrated else None}
    keep = checkpoint_parts.PartsOfModel.keep

    def keep_once(self, work, number):
        if number in calls:
            raise KeyboardInterrupt
        keep(self, work, number)
        calls.append(number)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_parts.PartsOfModel, "keep", keep_once)
    for _ in range(50):
        try:
            pql.quantize_checkpoint(folder, tmp_path / "quantized", CONFIG, **options)
            break
        except KeyboardInterrupt:
            continue
    assert len(calls) > 3
    monkeypatch.undo()
    monkeypatch.setattr(quantize_files, "PART_BYTES", 20_000)
    pql.quantize_checkpoint(folder, tmp_path / "expected", CONFIG, **options)
    assert_same(tmp_path / "quantized", tmp_path / "expected")


def test_a_head_that_differs_in_the_files_keeps_its_own_rows(tmp_path):
    folder = saved(tmp_path / "float")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    pql.quantize_checkpoint(folder, tmp_path / "quantized", CONFIG, progress=False)
    assert_same(tmp_path / "quantized", in_memory(folder, tmp_path / "expected", CONFIG))


def test_in_two_processes_too(tmp_path, monkeypatch):
    """Forks, which start in no time; test_quantize_checkpoint.py has spawned ones."""
    server = fork_server()
    monkeypatch.setattr(processes.multiprocessing, "get_context", lambda method: server)
    folder = saved(tmp_path / "float", "Gemma3ForCausalLM")
    pql.quantize_checkpoint(folder, tmp_path / "quantized", CONFIG, progress=False, n_processes=2)
    assert_same(tmp_path / "quantized", in_memory(folder, tmp_path / "expected", CONFIG))


def test_a_file_that_has_the_head_alone_gives_the_same_table(tmp_path):
    model = tiny_model("Gemma3ForCausalLM")
    state = model.state_dict()
    del state["model.embed_tokens.weight"]
    model.save_pretrained(tmp_path / "float")
    from safetensors.torch import save_file

    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "float" / "model.safetensors")
    pql.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", CONFIG, progress=False)
    assert_same(tmp_path / "quantized", in_memory(tmp_path / "float", tmp_path / "expected", CONFIG))
    assert torch.equal(
        pql.dequantize_model(type(model).from_pretrained(tmp_path / "quantized")).lm_head.weight[:1],
        pql.dequantize_model(type(model).from_pretrained(tmp_path / "expected")).model.embed_tokens.weight[:1],
    )
