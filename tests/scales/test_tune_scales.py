"""End-to-end tuning of scales: nearer to the teacher, codes and format as before, resumed to the same bits."""

import pytest
import torch
from every_method import SHAPES, all_methods, quick_config, quick_spec
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

import peft_quantlayers as pql
from peft_quantlayers import Calibration, HQQConfig, Predictions, record_predictions, tune_scales
from peft_quantlayers.layers.quantized_layers import quantized_layers
from peft_quantlayers.scales import tuning_state

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
DATA = Calibration(data=IDS, n_tokens=640, sequence_length=40, batch_size=1)
CONFIG = HQQConfig(nbits=2, group_size=16)


def sharp(family: str = "llama") -> nn.Module:
    """A model whose predictions depend on the tokens: random weights alone predict nothing."""
    if family == "t5":
        torch.manual_seed(0)
        sizes = {"d_model": 64, "d_ff": 96, "d_kv": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
        return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()
    model = tiny_model(family)
    for name, weight in model.named_parameters():  # of tied embeddings too: their own token would win by far
        if ".layers." in name or ".h." in name:
            weight.data.mul_(4 if weight.dim() == 2 else 1)
    model.get_output_embeddings().weight.data.mul_(8)
    return model


def quantized(family: str = "llama", config: pql.QuantConfig = CONFIG) -> nn.Module:
    return pql.quantize_model(sharp(family), config, progress=False)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Last parts of the names of tensors that are not as before."""
    now = model.state_dict()
    return {key.rpartition(".")[2] for key, tensor in before.items() if not torch.equal(now[key], tensor)}


def divergence(model: nn.Module, teacher: nn.Module) -> float:
    given = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        ours, theirs = (each(IDS, **given).logits.log_softmax(-1) for each in (model, teacher))
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3", "t5"])
def test_predictions_come_nearer_and_only_scales_change(family):
    teacher, model = sharp(family), quantized(family)
    before, kl = tensors(model), divergence(model, teacher)
    result = tune_scales(model, teacher, DATA, epochs=3, learning_rate=1e-2, progress=False)
    assert result.is_kept
    assert result.kl_after < 0.97 * result.kl_before
    assert divergence(model, teacher) < 0.95 * kl
    assert changed(model, before) == {"scale"}
    assert {key: tensor.dtype for key, tensor in model.state_dict().items()} == {k: t.dtype for k, t in before.items()}
    assert not any(
        parameter.requires_grad for layer in quantized_layers(model).values() for parameter in [layer.scale]
    )


@all_methods
def test_roles_of_every_method(method, tmp_path):
    model = quantized(config=quick_config(method))
    roles = quick_spec(method).trainable_roles(*SHAPES[0])
    train = sorted(set(roles.values()))
    before = tensors(model)
    # Of one batch, which it is judged on: whether a tiny random model's scales carry over to others is another matter.
    data = Calibration(data=IDS, n_tokens=640, sequence_length=40, batch_size=16)
    result = tune_scales(model, sharp(), data, train=train, epochs=20, learning_rate=3e-3, progress=False)
    assert result.is_kept
    assert changed(model, before) == set(roles)
    pql.save_model(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_recorded_predictions_are_those_of_the_model_and_go_through_a_file(tmp_path):
    teacher, model = sharp(), quantized()
    exact = record_predictions(teacher, DATA, n_kept=128, progress=False)
    few = record_predictions(teacher, DATA, n_kept=16, progress=False)
    with torch.no_grad():
        found = [
            sum(float(each.divergence(n, model(IDS[n : n + 1]).logits[0])) for n in range(len(IDS))) / len(IDS)
            for each in (exact, few)
        ]
    assert found[0] == pytest.approx(divergence(model, teacher), rel=1e-4)
    assert 0.3 * found[0] < found[1] <= found[0]
    few.save(tmp_path / "teacher.safetensors")
    loaded = Predictions.load(tmp_path / "teacher.safetensors")
    assert loaded.n_tokens == IDS.numel()
    ours, theirs = quantized(), quantized()
    tune_scales(ours, loaded, epochs=1, progress=False)
    tune_scales(theirs, few, epochs=1, progress=False)
    assert not changed(ours, tensors(theirs))


def test_padding_is_not_predicted(tmp_path):
    mask = torch.ones_like(IDS)
    mask[:, :10] = 0
    batches = [{"input_ids": IDS[n : n + 2], "attention_mask": mask[n : n + 2]} for n in range(0, 16, 2)]
    found = record_predictions(sharp(), batches, progress=False)
    assert found.n_tokens == int(mask.sum())
    found.save(tmp_path / "teacher.safetensors")
    result = tune_scales(quantized(), tmp_path / "teacher.safetensors", epochs=2, learning_rate=1e-2, progress=False)
    assert result.kl_after < result.kl_before


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    teacher = record_predictions(sharp(), DATA, progress=False)
    whole = quantized()
    expected = tune_scales(whole, teacher, epochs=2, learning_rate=1e-2, progress=False)
    monkeypatch.setattr(tuning_state, "SAVE_SECONDS", 0.0)
    model = quantized()
    before, n_steps = tensors(model), 0
    keep = tuning_state.TuningState.keep_sometimes

    def interrupted(self, *args):
        nonlocal n_steps
        n_steps += 1
        keep(self, *args)
        if n_steps == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(tuning_state.TuningState, "keep_sometimes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune_scales(model, teacher, epochs=2, learning_rate=1e-2, resume_folder=tmp_path / "run", progress=False)
    assert not changed(model, before)
    with pytest.raises(ValueError, match="belongs to another run"):
        tune_scales(model, teacher, epochs=3, learning_rate=1e-2, resume_folder=tmp_path / "run", progress=False)
    result = tune_scales(model, teacher, epochs=2, learning_rate=1e-2, resume_folder=tmp_path / "run", progress=False)
    assert result == expected
    assert n_steps == expected.n_steps  # those before the interruption were not made again
    assert not changed(model, tensors(whole))
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_what_does_not_help_leaves_the_model_as_it_was():
    model = quantized(config=HQQConfig(nbits=8, group_size=16))
    before = tensors(model)
    result = tune_scales(model, sharp(), DATA, epochs=1, learning_rate=0.9, progress=False)
    assert not result.is_kept
    assert result.kl_after == result.kl_before
    assert not changed(model, before)


def test_what_makes_no_sense_is_refused_and_changes_nothing(tmp_path):
    model, teacher = quantized(), record_predictions(sharp(), DATA, progress=False)
    (tmp_path / "other.safetensors").write_text("{}")
    before = tensors(model)
    for arguments, options, error, message in (
        ((sharp(), teacher), {}, ValueError, "no quantized linear layer"),
        ((model, teacher), {"train": ("codebooks",)}, ValueError, "with codebooks to train"),
        ((model, teacher), {"train": "scales"}, TypeError, "must be a list of roles"),
        ((model, teacher), {"train": ("norms",)}, ValueError, "train"),
        ((model, teacher, DATA), {}, ValueError, "leave calibration out"),
        ((model, sharp()), {}, ValueError, "needs calibration="),
        ((model, 3), {}, TypeError, "teacher must be a model"),
        ((model, tmp_path / "other.safetensors"), {}, ValueError, "holds no predictions"),
        ((model, sharp().model, DATA), {}, TypeError, "gives no logits"),
        ((model, teacher), {"epochs": 0}, ValueError, "epochs"),
    ):
        with pytest.raises(error, match=message):
            tune_scales(*arguments, progress=False, **options)
    other = sharp()
    other.resize_token_embeddings(140)
    with pytest.raises(ValueError, match="another vocabulary"):
        tune_scales(model, other, DATA, progress=False)
    assert not changed(model, before)
    with pytest.raises(ValueError, match="carries adapters"):
        tune_scales(get_peft_model(model, LoraConfig(target_modules="all-linear")), teacher, progress=False)
