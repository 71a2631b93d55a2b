"""Learned rotations: orthogonal whatever is learned, exact in the model, better than their start on the data."""

import logging

import pytest
import torch
from test_rotation import keep_float64
from tiny_models import change, logits, tiny_model
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.transforms.cayley import TrainedRotation, rounded_in_groups
from peft_quantlayers.transforms.rotation_core import rotation_matrix

DATA = torch.randint(3, 90, (1, 20), generator=torch.Generator().manual_seed(7)).repeat(16, 1)
CONFIG = pql.HQQConfig(nbits=2, group_size=16)
LEARNED = pql.Rotation(kind="learned", steps=6)


def exact_logits(model: torch.nn.Module) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        keep_float64(patch)
        return logits(model)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_trained_rotation_is_orthogonal_and_keeps_the_mean_where_asked(keeps_mean):
    start = rotation_matrix(12, use_hadamard=True, keeps_mean=keeps_mean, seed=0)
    rotation = TrainedRotation(start, keeps_mean=keeps_mean)
    assert torch.equal(rotation.matrix(), start)
    rotation.coordinates.data.normal_(generator=torch.Generator().manual_seed(0))
    matrix = rotation.matrix()
    assert change(matrix @ matrix.t(), torch.eye(12, dtype=torch.float64)) < 1e-13
    assert change(matrix, start) > 0.1
    ones = torch.ones(12, dtype=torch.float64)
    assert (change(matrix @ ones, ones) < 1e-13) == keeps_mean
    assert change(rotation().double(), matrix) < 1e-5


def test_the_rounding_is_that_of_a_grid_for_each_group_and_its_gradient_makes_ranges_smaller():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = rounded_in_groups(weight, 2, 8)
    for row, seen in zip(weight.detach().view(6, 8), rounded.detach().view(6, 8), strict=True):
        grid = torch.linspace(float(row.min()), float(row.max()), 4)
        assert torch.allclose(seen, grid[(row[:, None] - grid).abs().argmin(1)], atol=1e-5)
    assert torch.equal(rounded_in_groups(weight, 2, None), rounded_in_groups(weight, 2, 16))
    error = (rounded_in_groups(weight, 2, 8) - weight).square().sum()
    error.backward()
    smaller = weight.detach() - 0.02 * weight.grad
    assert float((rounded_in_groups(smaller, 2, 8) - smaller).square().sum()) < float(error)


@pytest.mark.parametrize(
    ("name", "start", "residual"),
    [
        ("llama", "hadamard", True),
        ("llama tied", "identity", True),
        ("phi3", "identity", True),
        ("gpt2", "random", True),
        ("qwen3_moe", "identity", True),
        ("gemma3", "identity", False),
    ],
)
def test_a_learned_rotation_leaves_what_the_model_computes(name, start, residual, caplog):
    model = tiny_model(name)
    before, required = exact_logits(model), [parameter.requires_grad for parameter in model.parameters()]
    transform = pql.Rotation(kind="learned", steps=3, start=start, residual=residual)
    with caplog.at_level(logging.INFO):
        pql.transform_model(model, transform, config=CONFIG, calibration=DATA, progress=False)
    assert change(exact_logits(model), before) < 1e-12
    assert "learned rotations: KL of rounded weights" in caplog.text
    assert not any("parametrizations" in key for key in model.state_dict())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(required) <= len(list(model.parameters()))  # a head may have been untied
    assert model.config.quantlayers_transforms[0]["start"] == start


def test_what_is_learned_lowers_the_divergence_that_it_is_learned_for(caplog):
    found = {}
    for steps in (1, 100):
        model = tiny_model("llama", torch.float32)
        transform = pql.Rotation(kind="learned", start="identity", steps=steps)
        with caplog.at_level(logging.INFO):
            pql.transform_model(model, transform, config=CONFIG, calibration=DATA, progress=False)
        record = next(each for each in reversed(caplog.records) if "learned rotations" in each.message)
        found[steps] = record.args[:2]
    assert found[100][0] < 0.9 * found[100][1]  # after, and at the start
    assert found[100][0] < found[1][0]


def test_it_goes_with_quantizing_saving_and_loading(tmp_path):
    model = tiny_model("llama", torch.float32)
    pql.quantize_model(model, CONFIG, transforms=LEARNED, calibration=DATA, progress=False)
    pql.save_model(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.config.quantlayers_transforms == [LEARNED.to_dict()]


def test_records_of_other_rotations_say_what_they_said_before():
    assert pql.Rotation().to_dict() == {
        "transform": "rotation",
        "kind": "hadamard",
        "residual": True,
        "heads": True,
        "seed": 0,
    }


def test_what_cannot_be_learned_is_refused_and_nothing_is_changed():
    model = tiny_model("llama", torch.float32)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for options, error, message in (
        ({"config": CONFIG}, ValueError, "Rotation measures inputs: give calibration="),
        ({"calibration": DATA}, ValueError, "give config="),
        ({"calibration": DATA, "config": pql.AQLMConfig()}, ValueError, "rounded to HQQ's grid"),
        ({"calibration": DATA, "config": pql.HQQConfig(axis=0, group_size=8)}, ValueError, "rounded to HQQ's grid"),
    ):
        with pytest.raises(error, match=message):
            pql.transform_model(model, LEARNED, progress=False, **options)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    for field in ({"steps": 0}, {"start": "givens"}, {"kind": "cayley"}):
        with pytest.raises(ValueError, match=next(iter(field))):
            pql.Rotation(**field)
