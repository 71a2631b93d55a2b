"""Merging and evaluating adapters on more than causal text models: calibrated, with held-out batches or a metric."""

import copy

import pytest
import torch
from calibration.other_models import MODELS, ids, noise, other_model
from peft import LoraConfig, PeftModel, get_peft_model

import peft_quantlayers as pql
from peft_quantlayers import Calibration, HQQConfig

TARGETS = {
    "t5": ["q", "v", "wo"],
    "bart": ["q_proj", "v_proj", "fc1"],
    "whisper": ["q_proj", "v_proj", "fc1"],
    "qwen2-vl": ["q_proj", "down_proj", "qkv"],
    "llava": ["q_proj", "down_proj", "fc1"],
    "bert": ["query", "value"],
    "vit": ["q_proj", "v_proj"],
    "wav2vec2": ["q_proj", "v_proj"],
    "mamba": ["in_proj", "x_proj"],
}


def adapted(name: str) -> PeftModel:
    base = pql.quantize_model(other_model(name), HQQConfig(nbits=4, group_size=16), progress=False)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS[name], init_lora_weights=False)).eval()


def first_output(model: torch.nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**MODELS[name].batches()[0]).logits


@pytest.mark.parametrize("name", TARGETS)
def test_a_calibrated_merge_reaches_what_the_batches_reach(name):
    model = adapted(name)
    expected = first_output(model, name)
    with model.disable_adapter():
        base = first_output(model, name)
    data = Calibration(data=MODELS[name].batches(), n_tokens=320, sequence_length=40)
    merged, report = pql.merge_back(model, strategy="calibrated", calibration=data, progress=False)
    assert {layer.strategy for layer in report.layers} <= {"calibrated", "requantize"}
    assert report.output_retained == pytest.approx(1.0, abs=0.1)
    assert (first_output(merged, name) - expected).norm() < (base - expected).norm()


EVALUATED = {
    "t5": lambda: MODELS["t5"].batches(),
    "bart": lambda: MODELS["bart"].batches(),
    "whisper": lambda: MODELS["whisper"].batches(),
    "qwen2-vl": lambda: MODELS["qwen2-vl"].batches(),
    "llava": lambda: MODELS["llava"].batches()[0],
    "bert": lambda: {"input_ids": ids(), "labels": ids()},
    "vit": lambda: {"pixel_values": noise(4, 3, 16, 16), "labels": torch.tensor([0, 1, 0, 1])},
    "mamba": lambda: ids()[0],
}


@pytest.mark.parametrize("name", EVALUATED)
def test_held_out_batches_are_compared_where_they_have_labels(name):
    model = adapted(name)
    held_out = EVALUATED[name]()
    lossless, report = pql.merge_back(copy.deepcopy(model), strategy="keep", evaluate_on=held_out, progress=False)
    assert report.capture.capture == pytest.approx(1.0, abs=1e-3)
    _, report = pql.merge_back(model, evaluate_on=held_out, progress=False)
    assert report.capture.kl_adapter_base > 0
    batch = held_out[0] if isinstance(held_out, list) else held_out
    if isinstance(batch, dict) and "labels" in batch:
        with torch.no_grad():  # transformers' own loss
            loss = lossless(**batch).loss
        assert report.capture.loss_adapter == pytest.approx(float(loss), rel=1e-3)


def test_padding_and_images_are_not_predicted():
    model = adapted("llava")
    batch = MODELS["llava"].batches()[0]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1, 25:] = 0
    _, report = pql.merge_back(model, evaluate_on=batch, progress=False)
    # Of 30 tokens 16 stand for the image, and nothing comes before the first one.
    assert report.capture.n_tokens == (30 - 16 - 1) + (25 - 16 - 1)


@pytest.mark.parametrize(
    ("name", "held_out", "error", "words"),
    [
        ("t5", lambda: ids()[0], TypeError, ["next token", '"labels"', "metric="]),
        ("bert", lambda: ids()[0], TypeError, ["next token", '"labels"', "metric="]),
        ("bert", lambda: {"input_ids": ids()}, ValueError, ["has no labels", "metric="]),
        ("vit", lambda: [1, 2, 3], TypeError, ["no vocabulary", "metric="]),
        ("wav2vec2", lambda: {"input_values": noise(2, 800), "labels": ids(2, 5)}, ValueError, ["metric="]),
        ("whisper", lambda: {"input_features": noise(2, 8, 60)}, ValueError, ["'decoder_input_ids' or 'labels'"]),
        ("llava", lambda: {"pixel_values": noise(2, 3, 16, 16)}, ValueError, ["metric="]),
    ],
)
def test_what_cannot_be_compared_is_refused_with_what_can(name, held_out, error, words):
    model = adapted(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(error) as refused:
        pql.merge_back(model, evaluate_on=held_out(), progress=False)
    assert all(word in str(refused.value) for word in words), str(refused.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["t5", "wav2vec2", "vit"])
def test_a_metric_works_with_every_model(name):
    def metric(model: torch.nn.Module) -> float:
        return float(first_output(model, name).norm())

    _, report = pql.merge_back(adapted(name), metric=metric, progress=False)
    assert report.scores[0] == pytest.approx(report.scores[1], rel=0.5)


def test_layers_that_the_held_out_data_does_not_reach_are_not_said_to_be_retained():
    _, report = pql.merge_back(adapted("llava"), evaluate_on=ids()[0], progress=False)
    outputs = {layer.name: layer.output_retained for layer in report.layers}
    assert all((value is None) == ("vision" in name) for name, value in outputs.items())
    assert any("vision" in name for name in outputs)


@pytest.mark.parametrize("progress", [True, False])
def test_steps_that_take_time_show_bars(progress, capsys):
    model = adapted("mamba")
    pql.merge_back(model, evaluate_on=ids()[0], metric=lambda model: 1.0, progress=progress)
    shown = capsys.readouterr().err
    for step in ("Merging", "Evaluating", "Scoring the adapter", "Scoring the merged model"):
        assert (step in shown) is progress
    model = adapted("mamba")
    data = Calibration(data=ids(8, 40), n_tokens=320, sequence_length=40)
    pql.merge_back(model, strategy="calibrated", calibration=data, progress=progress)
    shown = capsys.readouterr().err
    for step in ("Checking the data", "Calibrating"):
        assert (step in shown) is progress
