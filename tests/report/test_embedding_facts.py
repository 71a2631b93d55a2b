"""Quantized embeddings in summaries, cards, reports, plans and estimates: their bits, and one copy counted once."""

import pytest
import torch
from _tiny_models import tiny_model

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, HQQSpec, quantize_model, save_model, summary
from peft_quantlayers.estimate import estimate_merging, estimate_quantizing
from peft_quantlayers.report.reported_facts import model_facts

CONFIG = HQQConfig(nbits=4, quantize_embeddings=8)
CLASSES = ("LlamaForCausalLM", "Gemma3ForCausalLM", "T5ForConditionalGeneration", "BertForMaskedLM")


def facts(found):
    return [(each.name, each.spec, each.n_parameters, each.nbytes, each.detail) for each in found.quantized]


@pytest.mark.parametrize("name", CLASSES)
def test_a_summary_counts_shared_rows_once_and_a_planned_one_says_the_same(name):
    model = tiny_model(name)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    planned = summary(model, CONFIG)
    made = summary(quantize_model(model, CONFIG, progress=False))
    assert planned.n_parameters == made.n_parameters == n_parameters
    assert planned.nbytes == made.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert facts(planned) == facts(made)
    table = model.get_input_embeddings()
    (entry,) = [each for each in made.modules if each.name == table.layer_name]
    assert entry.spec == HQQSpec(nbits=8)
    assert entry.bits_per_weight == 8.5
    assert entry.nbytes == 256 * 64 * 8.5 / 8
    head = [each for each in made.modules if each.name == model.get_output_embeddings().layer_name]
    is_tied = bool(table.sharing)
    assert head[0].detail.startswith(f"shares a tensor with {table.layer_name}" if is_tied else "")
    assert bool(head[0].detail) == is_tied
    assert "embedding" not in {each.reason for each in made.dense if each.name == table.layer_name}


def test_a_summary_says_why_a_table_stays_dense():
    model = tiny_model("LlamaForCausalLM")
    model.model.embed_tokens.max_norm = 1.0
    (entry,) = [each for each in summary(model, CONFIG).dense if each.name == "model.embed_tokens"]
    assert entry.reason == "embedding"
    assert "max_norm" in entry.detail


@pytest.mark.parametrize("name", CLASSES[:2])
def test_the_card_the_report_and_the_estimates_count_them(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "float")
    meta = tiny_model(name).to("meta")
    meta.tie_weights()
    quantize_model(model, CONFIG, progress=False)
    save_model(model, tmp_path / "saved")
    card = (tmp_path / "saved" / "README.md").read_text()
    n_linear = 15 if name == "LlamaForCausalLM" else len(pql.quantized_modules(model)) - 1
    assert f"{n_linear} linear layers, the embeddings" in card
    weights = sum(each.n_parameters for each in summary(model).quantized)
    assert f"{weights:,} weights" in card
    found = {each.name: each for each in model_facts(model, float_model=tmp_path / "float", progress=False)}
    assert ("lm_head" in found) == (name == "LlamaForCausalLM")
    assert 0 < found["model.embed_tokens"].weight_error < 0.01
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert abs(estimate_quantizing(meta, CONFIG).disk - size) < 0.3 * size
    assert estimate_quantizing(meta, CONFIG).disk < estimate_quantizing(meta, HQQConfig(nbits=4)).disk
    merged = estimate_merging(meta, CONFIG)
    assert merged.disk == summary(model).nbytes


def test_a_plan_for_a_size_counts_the_rows_as_they_will_be():
    ids = [torch.randint(0, 256, (64,)) for _ in range(2)]
    plans = [
        pql.plan_bits(tiny_model("Gemma3ForCausalLM"), ids, config=config, average=4.5, progress=False)
        for config in (CONFIG, HQQConfig(nbits=4))
    ]
    assert plans[1].other_bytes - plans[0].other_bytes == 256 * 64 * (4 - 8.5 / 8)
