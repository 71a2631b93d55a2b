"""Models with quantized embeddings, saved and loaded by transformers: one copy of shared rows, in files too."""

import json

import pytest
import torch
from _tiny_models import first_float, tiny_inputs, tiny_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from peft_quantlayers import HQQConfig, HQQLinear, dequantize_model, quantize_model, save_model, verify_model
from peft_quantlayers.formats.checkpoint import specs_from_json
from peft_quantlayers.integrations.private_transformers import tied_weights
from peft_quantlayers.layers import LowRankBranch, QuantizedEmbedding
from peft_quantlayers.methods import spec_from_dict

CONFIG = HQQConfig(nbits=4, quantize_embeddings=8)
TIED = ("Gemma3ForCausalLM", "GPT2LMHeadModel", "T5ForConditionalGeneration", "BertForMaskedLM", "OPTForCausalLM")
UNTIED = ("LlamaForCausalLM", "Qwen3ForCausalLM", "MixtralForCausalLM", "LlavaForConditionalGeneration")


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return first_float(model(**tiny_inputs(model)))


def check_same(model: nn.Module, expected: torch.Tensor, *, is_tied: bool) -> None:
    assert torch.equal(outputs(model), expected)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head, HQQLinear)
    for name in ("W_q", "scale", "zero"):
        assert (getattr(table, name) is getattr(head, name)) == is_tied
    assert (head in table.sharing) == is_tied
    assert not any(parameter.requires_grad for parameter in (*table.parameters(), head.W_q, head.scale))


@pytest.mark.parametrize("name", [*TIED, *UNTIED])
def test_a_saved_model_is_loaded_again_with_one_copy_of_what_is_shared(name, tmp_path):
    model = quantize_model(tiny_model(name), CONFIG, progress=False)
    expected = outputs(model)
    save_model(model, tmp_path / "saved")
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [f"{key}.W_q" for key, each in model.named_modules() if each in (*ends, *ends[0].sharing)]
    names = [".".join(name.split(".")[-2:]) for name in names]  # files may have another prefix
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        stored = [key for key in file.keys() if key.endswith(tuple(names))]  # noqa: SIM118
    assert len(stored) == (1 if name in TIED else 2)
    fields = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] == 8
    assert set(fields["embeddings"]) <= {key for key, each in model.named_modules() if isinstance(each, nn.Embedding)}
    assert verify_model(tmp_path / "saved") == []
    loaded = type(model).from_pretrained(tmp_path / "saved")
    check_same(loaded, expected, is_tied=name in TIED)
    assert loaded.dtype == torch.float32
    # Once more, from the loaded model, and tied again by hand.
    loaded.tie_weights()
    save_model(loaded, tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").stat().st_size == (
        tmp_path / "saved" / "model.safetensors"
    ).stat().st_size
    check_same(type(model).from_pretrained(tmp_path / "again"), expected, is_tied=name in TIED)


@pytest.mark.parametrize("name", [*TIED, *UNTIED])
def test_a_float_model_is_quantized_while_it_is_loaded_to_the_same_bits(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    expected = outputs(quantize_model(model, CONFIG, progress=False))
    loaded = type(model).from_pretrained(tmp_path, quantization_config=CONFIG)
    check_same(loaded, expected, is_tied=name in TIED)


def test_rows_are_saved_and_read_by_a_body_without_a_head_and_the_other_way_round(tmp_path):
    model = quantize_model(tiny_model("Gemma3ForCausalLM"), CONFIG, progress=False)
    expected = outputs(model)
    save_model(model, tmp_path / "whole")
    body = AutoModel.from_pretrained(tmp_path / "whole")
    assert torch.equal(body.get_input_embeddings().codes, model.get_input_embeddings().codes)
    save_model(body, tmp_path / "body")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "body")
    check_same(whole, expected, is_tied=True)


def test_a_file_whose_head_differs_from_the_embeddings_keeps_both(tmp_path):
    model = tiny_model("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=CONFIG)
    expected = outputs(quantize_model(model, CONFIG, progress=False))
    check_same(loaded, expected, is_tied=False)


def test_a_resized_model_and_a_dense_one_are_saved_and_loaded(tmp_path):
    model = quantize_model(tiny_model("Gemma3ForCausalLM"), CONFIG, progress=False)
    model.resize_token_embeddings(300)
    expected = outputs(model)
    save_model(model, tmp_path / "resized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    check_same(loaded, expected, is_tied=True)
    assert loaded.get_input_embeddings().num_embeddings == 300
    dequantize_model(loaded)
    save_model(loaded, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    torch.testing.assert_close(outputs(dense), expected, rtol=1e-3, atol=1e-3)


def test_the_compute_dtype_of_the_config_holds_for_the_rows(tmp_path):
    model = tiny_model("Gemma3ForCausalLM").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    config = HQQConfig(nbits=4, quantize_embeddings=8, compute_dtype="float32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    assert loaded.get_input_embeddings().compute_dtype == torch.float32
    save_model(loaded, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.get_input_embeddings().compute_dtype == torch.float32
    assert torch.equal(outputs(again), outputs(loaded))


@pytest.mark.parametrize("fields", [{"embeddings": ["lm_head"]}, {"embeddings": {"a": 5}}, {"embeddings": {"b": 0}}])
def test_damaged_fields_are_refused(fields):
    spec = HQQConfig().spec_for("b").to_dict()
    whole = {"quant_method": "quantlayers", "format_version": 8, "specs": [spec], "modules": {"b": 0}}
    with pytest.raises((TypeError, ValueError), match="embeddings"):
        specs_from_json(whole | fields, spec_from_dict)
    with pytest.raises(ValueError, match="unknown field"):
        specs_from_json(whole | fields | {"format_version": 7}, spec_from_dict)


def test_a_config_that_calls_a_linear_layer_an_embedding_is_refused(tmp_path):
    model = quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False)
    save_model(model, tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    fields = config["quantization_config"]
    fields["embeddings"]["lm_head"] = fields["modules"].pop("lm_head")
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"lm_head: config\.json describes an embedding, and the model has a linear layer"
    ):
        LlamaForCausalLM.from_pretrained(tmp_path / "saved")


def test_a_copy_of_the_head_in_the_file_is_missing_nothing_and_damage_is_found(tmp_path):
    model = quantize_model(tiny_model("Gemma3ForCausalLM"), CONFIG, progress=False)
    save_model(model, tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-10] ^= 255
    file.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


def test_what_is_declared_as_tied_is_as_before_once_the_model_is_dense_again():
    model = tiny_model("BertForMaskedLM")
    before = tied_weights(model)
    quantize_model(model, CONFIG, progress=False)
    assert tied_weights(model) != before
    dequantize_model(model)
    assert tied_weights(model) == before


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM"])
def test_a_config_beside_a_saved_model_is_compared_with_its_tables(name, tmp_path, caplog):
    model = quantize_model(tiny_model(name), CONFIG, progress=False)
    save_model(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=CONFIG)
    check_same(loaded, outputs(model), is_tied=name in TIED)
    assert "quantized already, as quantization_config says" in caplog.text
    for bits in (None, 4):
        with pytest.raises(ValueError, match=r"(embed_tokens|lm_head) is HQQSpec"):
            type(model).from_pretrained(tmp_path, quantization_config=HQQConfig(nbits=4, quantize_embeddings=bits))


@pytest.mark.parametrize("name", ["Gemma3ForCausalLM", "LlamaForCausalLM"])
def test_a_branch_of_a_head_is_saved_and_loaded_and_refused_where_the_config_has_none(name, tmp_path):
    model = quantize_model(tiny_model(name), CONFIG, progress=False)
    head = model.get_output_embeddings()
    head.add_branch(LowRankBranch(torch.randn(4, head.in_features), torch.randn(head.out_features, 4)))
    expected = outputs(model)
    save_model(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    check_same(loaded, expected, is_tied=name in TIED)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["quantization_config"]["branches"]
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected tensor '.*branch\.[AB]'"):
        type(model).from_pretrained(tmp_path)
