"""What the sweeps begin with: chosen for each layer on held-out tokens, refused where a method knows one way only."""

import pytest
import torch
from integrations.tiny import tiny_model
from torch import Tensor

from peft_quantlayers import AQLMConfig, Calibration, HQQConfig, HQQSpec, quantize_model, quantized_modules
from peft_quantlayers.calibration import initial_codes
from peft_quantlayers.calibration.initial_codes import chosen_initial_codes
from peft_quantlayers.calibration.statistics import InputStatistics, collect
from peft_quantlayers.methods import get_method

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
CONFIG = HQQConfig(nbits=3, group_size=16)
SPEC = HQQSpec(nbits=3, group_size=16)
KINDS = ("nearest", "error_feedback", "act_order", "best")


def calibration(kind: str, **fields) -> Calibration:
    return Calibration(data=IDS, n_tokens=640, sequence_length=40, initial_codes=kind, **fields)


def inputs(n_tokens: int, decay: float) -> Tensor:
    """Whose energy falls off from direction to direction."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    return torch.randn(n_tokens, 64, generator=generator) * torch.exp(-decay * torch.arange(64)) @ basis


def statistics(x: Tensor) -> InputStatistics:
    return collect([x], ("second_moment", "first_half"))


def test_error_feedback_is_chosen_where_few_directions_carry_the_inputs():
    weight, given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), statistics(inputs(4000, 0.2))
    options = calibration("best", damping=1e-3, shrinkage=0.0)
    chosen = chosen_initial_codes(weight, SPEC, given, options, layer_name="layer")
    assert chosen in ("error_feedback", "act_order")


@pytest.mark.parametrize("decay", [0.0, 0.05, 0.2])
def test_the_choice_is_the_lowest_error_on_the_other_half(decay):
    weight, given = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)), statistics(inputs(600, decay))
    options, method = calibration("best"), get_method("hqq")
    errors = {}
    for kind in method.initial_codes:
        errors[kind] = 0.0
        for fitted, held_out in (given.halves(), given.halves()[::-1]):
            hessian = fitted.hessian(damping=options.damping, shrinkage=options.used_shrinkage)
            lost = method.dequantize(method.quantize(weight, SPEC, hessian=hessian, initial_codes=kind)) - weight
            errors[kind] += float((lost @ held_out.second_moment * lost).sum())
    assert chosen_initial_codes(weight, SPEC, given, options, layer_name="layer") == min(errors, key=errors.get)


def test_without_data_or_halves_codes_begin_with_the_nearest():
    weight = torch.randn(32, 64)
    for given in (None, collect([inputs(100, 0.1)], ("second_moment",))):
        assert chosen_initial_codes(weight, SPEC, given, calibration("best"), layer_name="layer") == "nearest"


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_quantized_as_it_says(kind, monkeypatch):
    monkeypatch.setattr(initial_codes, "ROWS", 8)
    models = [
        quantize_model(tiny_model(), CONFIG, calibration=given, progress=False)
        for given in (calibration(kind), calibration(kind), calibration("nearest"))
    ]
    found, again, nearest = (
        {name: layer.quantized_weight.codes() for name, layer in quantized_modules(model).items()} for model in models
    )
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert all(torch.equal(found[name], nearest[name]) for name in found) == (kind == "nearest")


def test_aqlm_has_one_way_only_and_says_so():
    config, model = AQLMConfig(nbits_per_codebook=4, rounds=1), tiny_model()
    with pytest.raises(ValueError, match=r'q_proj: initial_codes=.act_order.*initial_codes="best"'):
        quantize_model(model, config, calibration=calibration("act_order"), progress=False)
    assert not quantized_modules(model)
    found, nearest = (
        quantize_model(tiny_model(), config, calibration=calibration(kind), progress=False).state_dict()
        for kind in ("best", "nearest")
    )
    assert all(torch.equal(found[key], nearest[key]) for key in nearest)


def test_a_resume_folder_of_another_start_is_another_run(tmp_path):
    quantize_model(tiny_model(), CONFIG, calibration=calibration("nearest", resume_folder=tmp_path), progress=False)
    with pytest.raises(ValueError, match="another run"):
        quantize_model(
            tiny_model(), CONFIG, calibration=calibration("act_order", resume_folder=tmp_path), progress=False
        )
