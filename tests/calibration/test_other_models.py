"""Calibration of more than causal text models: encoder-decoders, vision-language models, encoders, audio, Mamba."""

import logging

import pytest
import torch
from calibration.other_models import BART, MODELS, SIZES, ids, inputs_by_layer, other_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_quantlayers import Calibration, HQQConfig, quantize_model, quantized_modules
from peft_quantlayers.calibration import InputStatistics, Visitor, walk
from peft_quantlayers.layers import quantizable_modules

CONFIG = HQQConfig(nbits=4, group_size=16)


class Recorder(Visitor):
    statistics = ("second_moment",)

    def __init__(self) -> None:
        self.seen: dict[str, InputStatistics | None] = {}

    def visit(self, name: str, statistics: InputStatistics | None) -> None:
        self.seen[name] = statistics


def moments_of_a_plain_pass(model: nn.Module, names: list[str], batches: list[dict]) -> dict[str, Tensor]:
    """Second moments of all that each layer reads while the model runs as a user runs it."""
    seen = inputs_by_layer(model, names, batches)
    return {name: x.t() @ x / len(x) for name, parts in seen.items() if parts for x in [torch.cat(parts)]}


@pytest.mark.parametrize("name", MODELS)
def test_batches_of_the_forwards_keywords_reach_every_layer_that_a_plain_pass_reaches(name):
    model, batches = other_model(name), MODELS[name].batches()
    names = list(quantizable_modules(model, CONFIG))
    recorder = Recorder()
    walk(model, names, Calibration(data=batches, batch_size=64, sequence_length=40), recorder, progress=False)
    expected = moments_of_a_plain_pass(model, names, batches)
    assert {name for name, seen in recorder.seen.items() if seen is not None} == set(expected)
    for layer, moment in expected.items():
        torch.testing.assert_close(recorder.seen[layer].second_moment, moment, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain_data", "batches"])
@pytest.mark.parametrize("name", MODELS)
def test_a_calibrated_model_runs_and_unreached_towers_are_named_once(name, kind, caplog):
    model, results = other_model(name), []
    data = Calibration(data=getattr(MODELS[name], kind)(), n_tokens=320, sequence_length=40)
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        quantize_model(model, CONFIG, calibration=data, progress=False, on_layer=results.append)
    assert {result.name for result in results} == set(quantized_modules(model))
    plain = {result.name for result in results if result.output_error is None}
    said = [record.getMessage() for record in caplog.records if "without calibration" in record.getMessage()]
    if kind == "plain_data" and MODELS[name].unreached:
        tower = MODELS[name].unreached
        assert len(said) == 1
        assert tower in said[0]
        assert any(layer.startswith(tower) for layer in plain)
        assert all(layer.startswith((tower, "model.multi_modal_projector")) for layer in plain)
    elif name == "mamba":  # whose forward reads the weight of this layer, and never calls it
        assert plain == {"backbone.layers.0.mixer.dt_proj", "backbone.layers.1.mixer.dt_proj"}
        assert "skip_modules=['backbone.layers.*.mixer.dt_proj']" in said[0]
    elif name != "llava":  # whose last vision blocks run, and give nothing that is used
        assert not plain
        assert not said
    with torch.no_grad():
        output = model(**MODELS[name].batches()[0])
    assert all(torch.isfinite(value).all() for value in output.values() if isinstance(value, Tensor))


@pytest.mark.parametrize("name", ["qwen2-vl", "llava"])
def test_what_the_warning_says_leaves_the_tower_dense(name, caplog):
    quantize_model(other_model(name), CONFIG, calibration=Calibration(data=ids(8, 40), n_tokens=320), progress=False)
    [said] = [record.getMessage() for record in caplog.records if "skip_modules" in record.getMessage()]
    skipped = said.split("skip_modules=[")[1].split("]")[0].replace("'", "").split(", ")
    caplog.clear()
    model = quantize_model(
        other_model(name),
        HQQConfig(nbits=4, group_size=16, skip_modules=skipped),
        calibration=Calibration(data=ids(8, 40), n_tokens=320),
        progress=False,
    )
    assert quantized_modules(model)
    assert not any(layer.startswith(MODELS[name].unreached) for layer in quantized_modules(model))
    assert "without calibration" not in caplog.text


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoder_reads_the_labels_shifted_as_the_model_shifts_them(name):
    model, labels = other_model(name), ids(4, 20, seed=1)
    names = list(quantizable_modules(model, CONFIG))
    given, shifted = Recorder(), Recorder()
    walk(model, names, Calibration(data={"input_ids": ids(), "labels": labels}), given, progress=False)
    decoder = model.prepare_decoder_input_ids_from_labels(labels=labels)
    walk(model, names, Calibration(data={"input_ids": ids(), "decoder_input_ids": decoder}), shifted, progress=False)
    for layer in names:
        assert torch.equal(given.seen[layer].second_moment, shifted.seen[layer].second_moment)


@pytest.mark.parametrize(
    "config",
    [
        T5Config(vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4),
        EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**SIZES), BertConfig(**SIZES)),
    ],
    ids=["t5", "two berts"],
)
def test_a_decoder_without_a_start_token_is_calibrated_too(config):
    model = (EncoderDecoderModel if isinstance(config, EncoderDecoderConfig) else T5ForConditionalGeneration)(config)
    data = Calibration(data=ids(8, 40), n_tokens=320)
    results = []
    quantize_model(model, CONFIG, calibration=data, progress=False, on_layer=results.append)
    assert all(result.output_error is not None for result in results)


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_a_classifier_that_fails_after_the_last_layer_is_calibrated(name):
    """Of several sequences without padding token, and of texts without end token, it finds no last token."""
    if name == "llama":
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES | {"pad_token_id": None}))
    else:
        model = BartForSequenceClassification(BartConfig(**BART))
    results = []
    quantize_model(
        model.eval(),
        CONFIG,
        calibration=Calibration(data=ids(8, 40), n_tokens=320, sequence_length=40),
        progress=False,
        on_layer=results.append,
    )
    assert all(result.output_error is not None for result in results)
    assert len(results) == (14 if name == "llama" else 32)


class Parts(PreTrainedModel):
    """Has no forward of its own, as models that speak: their ``generate`` calls one part after the other."""

    config_class = T5Config

    def __init__(self) -> None:
        super().__init__(T5Config())
        self.text = other_model("xlm")
        self.speech = other_model("bert")


def test_a_model_without_a_forward_is_calibrated_by_its_parts():
    model = Parts()
    with pytest.raises(ValueError, match=r"parts \['text', 'speech'\].*quantize_model\(model\.text, config"):
        quantize_model(model, CONFIG, calibration=ids(8, 40), progress=False)
    quantize_model(model.text, CONFIG, calibration=ids(8, 40), progress=False)
    assert quantized_modules(model)


def test_data_that_reaches_no_layer_is_refused():
    model = other_model("llava")
    config = HQQConfig(nbits=4, group_size=16, skip_modules=["language_model"])
    with pytest.raises(ValueError, match=r"reaches none of the \d+ layers, such as model\.vision_tower"):
        quantize_model(model, config, calibration=ids(8, 40), progress=False)
    assert not quantized_modules(model)


@pytest.mark.parametrize(
    ("name", "side"), [("bert", "right"), ("t5", "right"), ("bart", "right"), ("llava", "right"), ("llava", "left")]
)
def test_padding_does_not_count(name, side):
    """Statistics of two padded rows are those of the same rows one by one, without padding."""
    model = other_model(name)
    names = [
        layer for layer in quantizable_modules(model, CONFIG) if "vision" not in layer and "projector" not in layer
    ]
    long, short = ids(1, 24)[0], ids(1, 10, seed=3)[0]
    padding = torch.zeros(14, dtype=torch.long)
    row = torch.cat([padding, short] if side == "left" else [short, padding])
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :14] = 0 if side == "left" else 1
    mask[1, 10:] = 0 if side == "right" else mask[1, 10:]
    rows = [{"input_ids": long[None]}, {"input_ids": short[None]}]
    batch = {"input_ids": torch.stack([long, row]), "attention_mask": mask}
    if name in ("t5", "bart"):
        targets = [ids(1, 12, seed=4), ids(1, 8, seed=5)]
        rows = [row | {"labels": target} for row, target in zip(rows, targets, strict=True)]
        batch["labels"] = torch.cat([targets[0], torch.nn.functional.pad(targets[1], (0, 4), value=-100)])
    recorder = Recorder()
    walk(model, names, Calibration(data=[batch], batch_size=8), recorder, progress=False)
    expected = moments_of_a_plain_pass(model, names, rows)
    for layer in expected:
        assert recorder.seen[layer].n_tokens < 48, layer
        torch.testing.assert_close(recorder.seen[layer].second_moment, expected[layer], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["wav2vec2", "whisper"])
def test_frames_of_padding_do_not_count(name):
    """Where the processor gives a mask of samples or frames: in the model's own frames, which are fewer."""
    model = other_model(name)
    names = [layer for layer in quantizable_modules(model, CONFIG) if "decoder" not in layer]
    key, n_samples = ("input_values", 400) if name == "wav2vec2" else ("input_features", 60)
    [batch] = MODELS[name].batches()[:1]
    sound = torch.randn(2, *([n_samples] if name == "wav2vec2" else [8, n_samples]))
    mask = torch.ones(2, n_samples, dtype=torch.long)
    n_real = n_samples // 2
    mask[1, n_real:] = 0
    sound[1, ..., n_real:] = 0
    padded, whole, seen = {**batch, key: sound}, Recorder(), Recorder()
    if name == "whisper":
        padded["decoder_input_ids"] = ids(2, 6)
    walk(model, names, Calibration(data=[padded | {"attention_mask": mask}]), seen, progress=False)
    walk(model, names, Calibration(data=[padded]), whole, progress=False)
    layer = next(layer for layer in names if "q_proj" in layer)
    n_frames = whole.seen[layer].n_tokens
    assert n_frames * 3 // 4 - 2 <= seen.seen[layer].n_tokens <= n_frames * 3 // 4 + 1
    if name == "wav2vec2":  # whose layers see nothing of the padding
        rows = [{key: sound[:1]}, {key: sound[1:, :n_real]}]
        expected = moments_of_a_plain_pass(model, names, rows)
        for layer in names:
            torch.testing.assert_close(seen.seen[layer].second_moment, expected[layer], rtol=1e-3, atol=1e-4)
