"""AWQ scales lower the output error of rounding, and change nothing else."""

import pytest
import torch
from calibration.other_models import MODELS as OTHER_MODELS
from calibration.other_models import other_model
from tiny_models import change, logits, tiny_model

import peft_quantlayers as pql
from peft_quantlayers.calibration.model_calls import model_calls
from peft_quantlayers.methods import get_method
from peft_quantlayers.transforms.awq_core import (
    Reader,
    best_scale,
    clip_limits,
    clipped,
    output_error,
    relative_weights,
    scale_candidates,
)
from peft_quantlayers.transforms.scale_trials import distance, norm, outputs_of

SPEC = pql.HQQSpec(nbits=2, group_size=16)
CONFIG = pql.HQQConfig(nbits=3, group_size=8)
DATA = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(7))


def rounding(weight: torch.Tensor) -> torch.Tensor:
    method = get_method("hqq")
    return method.dequantize(method.quantize(weight, SPEC))


def reader_with_outliers() -> tuple[Reader, torch.Tensor]:
    """A weight, and inputs of which two channels are large; the mean of their absolute values."""
    x = torch.randn(200, 32)
    x[:, [3, 20]] *= 30
    return Reader(torch.randn(24, 32), x.t() @ x / len(x), rounding), x.abs().mean(0)


def test_scales_protect_the_channels_whose_inputs_are_large():
    reader, mean_abs = reader_with_outliers()
    candidates = list(scale_candidates(mean_abs, relative_weights([reader.weight], [16]), 10))
    assert torch.equal(candidates[0], torch.ones(32))
    assert all(abs(float(scale.max() * scale.min()) - 1) < 1e-5 for scale in candidates)
    scale, error, before = best_scale([reader], iter(candidates), lambda scale: scale)
    assert error < 0.7 * before
    assert set(scale.topk(2).indices.tolist()) == {3, 20}
    assert error == pytest.approx(output_error([reader], scale))


def test_the_error_is_that_of_the_outputs_of_the_tokens_themselves():
    x, weight, scale = torch.randn(50, 32), torch.randn(24, 32), torch.rand(32) + 0.5
    reader = Reader(weight, x.t() @ x / 50, rounding)
    outputs = (x / scale) @ rounding(weight * scale).t()
    assert output_error([reader], scale) == pytest.approx(
        float((outputs - x @ weight.t()).square().sum() / 50), rel=1e-3
    )


def test_scales_of_no_use_are_left_at_one():
    reader = Reader(torch.randn(24, 32), torch.eye(32), lambda weight: weight)  # nothing is rounded
    scale, _, _ = best_scale(
        [reader], scale_candidates(torch.ones(32), relative_weights([reader.weight], [16]), 4), lambda scale: scale
    )
    assert torch.equal(scale, torch.ones(32))


def test_clipping_lowers_each_groups_error_and_leaves_groups_alone_that_it_would_harm():
    weight = torch.randn(24, 32)
    weight[:8, 5] = 12  # an outlier of an input that hardly counts
    moment = torch.eye(32)
    moment[5, 5] = 1e-4

    def coarse(weight: torch.Tensor) -> torch.Tensor:
        """Four levels from the lowest to the highest of each group."""
        groups = weight.unflatten(1, (-1, 16))
        low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
        return (((groups - low) / (high - low) * 3).round() / 3 * (high - low) + low).flatten(1)

    reader = Reader(weight, moment, coarse)
    limits = clip_limits(reader, 16)
    assert limits.shape == (24, 2)
    assert bool((limits[:8, 0] < 12).all())
    assert bool((limits <= weight.abs().unflatten(1, (-1, 16)).amax(2)).all())

    def errors(candidate: torch.Tensor) -> torch.Tensor:
        delta = (coarse(candidate) - weight).square() * moment.diagonal()
        return delta.unflatten(1, (-1, 16)).sum(2)

    assert bool((errors(clipped(weight, limits)) <= errors(weight) + 1e-6).all())


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "qwen3", "mistral", "qwen3_moe", "cohere"])
def test_a_model_with_awq_scales_computes_what_it_did(name):
    model = tiny_model(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    result = pql.transform_model(model, pql.AWQScales(n_grid=2), config=CONFIG, calibration=DATA, progress=False)
    assert result is model
    assert change(logits(model), before) < (1e-6 if name in ("gemma3", "cohere") else 1e-9)
    assert sum(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()) >= 8
    assert model.config.quantlayers_transforms[0]["transform"] == "awq_scales"


def test_scales_lower_the_divergence_of_the_quantized_model():
    def divergence(transforms: list | None) -> float:
        model = tiny_model("llama", torch.float32)
        with torch.no_grad():
            for layer in model.model.layers:
                layer.input_layernorm.weight[[1, 9]] *= 20
                layer.post_attention_layernorm.weight[[2, 17]] *= 20
        expected = logits(model).log_softmax(-1)
        config = pql.HQQConfig(nbits=3, group_size=16)
        if transforms:
            pql.transform_model(model, transforms, config=config, calibration=DATA, progress=False)
        pql.quantize_model(model, config, progress=False)
        return float((expected.exp() * (expected - logits(model).log_softmax(-1))).sum(-1).mean())

    assert divergence([pql.AWQScales()]) < 0.8 * divergence(None)


def test_clipped_weights_are_said_to_be_no_exact_transform():
    model = tiny_model("llama", torch.float32)
    before = logits(model)
    transform = pql.AWQScales(n_grid=2, clip=True)
    assert not transform.is_exact
    pql.transform_model(
        model, transform, config=pql.HQQConfig(nbits=2, group_size=16), calibration=DATA, progress=False
    )
    assert 1e-4 < change(logits(model), before) < 1


def test_layers_that_are_not_quantized_decide_nothing():
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.down_proj.weight.clone()
    config = pql.HQQConfig(nbits=3, group_size=8, skip_modules=["mlp"])
    pql.transform_model(model, pql.AWQScales(n_grid=2), config=config, calibration=DATA, progress=False)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, weight)


def test_what_it_needs_is_asked_for_and_nothing_changes():
    model = tiny_model("llama")
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="AWQScales measures inputs: give calibration="):
        pql.transform_model(model, pql.AWQScales(), config=CONFIG)
    with pytest.raises(ValueError, match="AWQScales has to know what the layers will be quantized to: give config="):
        pql.transform_model(model, pql.AWQScales(), calibration=DATA)
    aqlm = pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=4, in_group_size=8)
    with pytest.raises(ValueError, match=r"q_proj: AWQScales rounds each weight .*grid=HQQConfig"):
        pql.transform_model(model, pql.AWQScales(), config=aqlm, calibration=DATA)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_search_may_round_to_another_grid_than_the_layers():
    model = tiny_model("llama")
    before = logits(model)
    aqlm = pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=4, in_group_size=8)
    transform = pql.AWQScales(n_grid=2, grid=pql.HQQConfig(nbits=2, group_size=16))
    pql.transform_model(model, transform, config=aqlm, calibration=DATA, progress=False)
    assert change(logits(model), before) < 1e-9
    assert model.config.quantlayers_transforms[0]["grid"]["nbits"] == 2


@pytest.mark.parametrize("name", ["t5", "whisper", "qwen2-vl", "vit", "mamba", "bart", "xlm"])
def test_other_kinds_of_models_compute_what_they_did(name):
    model, data = other_model(name), OTHER_MODELS[name].batches()
    call = model_calls(model, data)[0]
    before = outputs_of(model, call)
    pql.transform_model(model, pql.AWQScales(n_grid=1), config=CONFIG, calibration=data, progress=False)
    assert distance(outputs_of(model, call), before) < 1e-5 * norm(before)


def test_a_model_without_a_place_before_the_layers_to_quantize_is_refused_by_name():
    model, data = other_model("bert"), OTHER_MODELS["bert"].batches()
    with pytest.raises(ValueError, match=r"BertForMaskedLM has no place .* not changed"):
        pql.transform_model(model, pql.AWQScales(), config=CONFIG, calibration=data, progress=False)
