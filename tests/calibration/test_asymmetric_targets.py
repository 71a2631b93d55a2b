"""Asymmetric targets: the float model's outputs from a quantized model's inputs, never worse on held-out tokens."""

import copy
import weakref

import pytest
import torch
from calibration.other_models import MODELS, inputs_by_layer, other_model
from every_method import methods_for, quick_config
from integrations.tiny import tiny_model
from torch import Tensor, nn

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, Calibration, HQQConfig, quantize_model, quantized_modules
from peft_quantlayers.calibration import InputStatistics, Visitor, layer_passes, unchanged_block, walk
from peft_quantlayers.calibration.asymmetric_targets import DAMPINGS, asymmetric_target, chosen_dampings
from peft_quantlayers.calibration.quantize_calibrated import wanted_statistics
from peft_quantlayers.calibration.statistics import PairedInput, collect
from peft_quantlayers.layers import quantizable_modules

WANTED = ("second_moment", "deviation_moment", "first_half")
IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(1))
CONFIGS = {name: quick_config(name) for name in methods_for("calibrated")} | {
    "hqq": HQQConfig(nbits=2, group_size=16),
    "aqlm": AQLMConfig(nbits_per_codebook=4),
}


def calibration(**fields) -> Calibration:
    return Calibration(data=IDS, **({"n_tokens": 640, "sequence_length": 40, "asymmetric_targets": True} | fields))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(n_tokens: int, *, seed: int, spread: float) -> PairedInput:
    """Inputs, and float ones that are a linear map of them plus noise of this spread."""
    x = noise(n_tokens, 12, seed=seed)
    mixing = torch.eye(12) + 0.2 * noise(12, 12, seed=99)
    return PairedInput(x, x @ mixing.t() + spread * noise(n_tokens, 12, seed=seed + 1))


def output_error(weight: Tensor, target: Tensor, given: PairedInput) -> float:
    return float((given.x @ target.t() - given.original @ weight.t()).square().mean())


def test_a_linear_deviation_is_made_up_for():
    weight, fresh = noise(6, 12, seed=5), pairs(500, seed=10, spread=0.0)
    target = asymmetric_target(weight, collect([pairs(2000, seed=0, spread=0.0)], WANTED))
    assert output_error(weight, target, fresh) < 1e-3 * output_error(weight, weight, fresh)


@pytest.mark.parametrize("n_tokens", [14, 40, 2000])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])
def test_few_tokens_and_noise_are_damped_until_fresh_tokens_lose_nothing(n_tokens, spread):
    weight, fresh = noise(6, 12, seed=5), pairs(5000, seed=10, spread=spread)
    before = after = 0.0
    for seed in range(20, 60, 2):
        target = asymmetric_target(weight, collect([pairs(n_tokens, seed=seed, spread=spread)], WANTED))
        before += output_error(weight, weight, fresh)
        after += output_error(weight, weight if target is None else target, fresh)
    assert after < 1.02 * before
    if (n_tokens, spread) == (2000, 0.3):
        assert after < 0.3 * before


def test_less_data_is_damped_more():
    weight = noise(6, 12, seed=5)
    chosen = [
        [chosen_dampings([weight], collect([pairs(n, seed=seed, spread=1.0)], WANTED))[0] for seed in range(20, 40, 2)]
        for n in (30, 3000)
    ]
    few, many = (sum(2 * DAMPINGS[-1] if damping is None else damping for damping in each) for each in chosen)
    assert few > 3 * many


def test_the_same_inputs_and_unknown_ones_have_no_target():
    weight, x = noise(6, 12), noise(200, 12, seed=1)
    assert asymmetric_target(weight, None) is None
    assert asymmetric_target(weight, collect([x], WANTED)) is None
    assert asymmetric_target(weight, collect([PairedInput(x, x)], WANTED)) is None
    assert asymmetric_target(weight, collect([PairedInput(x, 2 * x), PairedInput(x, None)], WANTED)) is None
    assert asymmetric_target(weight, collect([PairedInput(x[:1], 2 * x[:1])], WANTED)) is None  # no second half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_target_is_float32_and_its_arguments_stay(dtype):
    weight, statistics = noise(6, 12, seed=5).to(dtype), collect([pairs(300, seed=0, spread=0.1)], WANTED)
    before = copy.deepcopy(statistics)
    assert asymmetric_target(weight, statistics).dtype == torch.float32
    assert torch.equal(statistics.second_moment, before.second_moment)
    assert torch.equal(statistics.deviation_moment, before.deviation_moment)
    assert torch.equal(statistics.first_half.deviation_moment, before.first_half.deviation_moment)


class Noisy(Visitor):
    """Adds noise to each weight on the way, and records the statistics."""

    statistics = WANTED

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.seen: dict[str, InputStatistics | None] = {}

    def visit(self, name: str, statistics: InputStatistics | None) -> None:
        self.seen[name] = statistics
        module = self.model.get_submodule(name)
        replaced = copy.deepcopy(module)
        with torch.no_grad():
            replaced.weight.add_(0.3 * replaced.weight.std() * noise(*replaced.weight.shape, seed=len(self.seen)))
        self.model.set_submodule(name, replaced)


@pytest.mark.parametrize("waiting_bytes", [0, 30_000, 1 << 29])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma3", "gpt2", "bert"])
def test_deviations_are_those_of_the_unchanged_model(family, waiting_bytes, monkeypatch):
    monkeypatch.setattr(layer_passes, "WAITING_BYTES", waiting_bytes)
    batches = [{"input_ids": part} for part in IDS[:4].split(2)]
    check_deviations(
        tiny_model(family), batches, Calibration(data=IDS[:4], n_tokens=160, sequence_length=40, batch_size=2)
    )


@pytest.mark.parametrize("name", ["t5", "whisper", "bart"])
def test_deviations_in_encoder_decoders(name):
    batches = MODELS[name].batches()
    check_deviations(other_model(name), batches, Calibration(data=batches), has_padding=True)


def check_deviations(model: nn.Module, batches: list[dict], given: Calibration, *, has_padding: bool = False) -> None:
    original, names = copy.deepcopy(model).eval(), list(quantizable_modules(model, HQQConfig(group_size=16)))
    visitor = Noisy(model)
    walk(model, names, given, visitor, progress=False)
    expected, found = inputs_by_layer(original, names, batches), inputs_by_layer(model.eval(), names, batches)
    n_compared = 0
    for name, statistics in visitor.seen.items():
        if statistics is None or statistics.deviation_moment is None:
            assert not any(part in name for part in ("layer", "block", ".h.")), name
            continue
        x, x_float = torch.cat(found[name]), torch.cat(expected[name])
        if has_padding and statistics.n_tokens != len(x):
            continue
        moment = (x_float - x).t() @ x / len(x)
        torch.testing.assert_close(
            statistics.deviation_moment, moment, rtol=1e-3, atol=1e-4 * float(x.square().mean())
        )
        first, second = statistics.halves()
        assert first.n_tokens + second.n_tokens == statistics.n_tokens
        both = (first.n_tokens * first.deviation_moment + second.n_tokens * second.deviation_moment) / len(x)
        torch.testing.assert_close(both, moment, rtol=1e-3, atol=1e-4 * float(x.square().mean()))
        n_compared += 1
    assert n_compared > 6


class Routed(nn.Module):
    """A block with a dense layer and two experts, of which each token takes the one that its sign says."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(x)
        flat = x.reshape(-1, 8)
        result = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            chosen = torch.where((flat[:, 0] > 0) == bool(index))[0]
            result[chosen] = expert(flat[chosen])
        return x + result.view(x.shape)


def test_experts_that_get_other_tokens_than_in_the_float_model_have_no_deviation():
    torch.manual_seed(0)
    model = nn.Sequential()
    model.layers = nn.ModuleList([Routed() for _ in range(2)])
    model.forward = lambda x: model.layers[1](model.layers[0](x))
    visitor = Noisy(model)
    names = [f"layers.{block}.{part}" for block in range(2) for part in ("dense", "experts.0", "experts.1")]
    walk(model, names, Calibration(data=[noise(2, 64, 8)]), visitor, progress=False)
    assert {name: found.deviation_moment is not None for name, found in visitor.seen.items()} == {
        name: name.endswith("dense") for name in names
    }


def model_error(model: nn.Module) -> float:
    """Squared distance of the last hidden states on held-out ids from the float model's, relative."""
    with torch.no_grad():
        expected = tiny_model().model(HELD_OUT).last_hidden_state
        found = model.model(HELD_OUT).last_hidden_state.float()
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.mark.parametrize("method", CONFIGS)
def test_every_method_has_a_lower_error_with_them_on_held_out_tokens(method):
    errors = [
        model_error(quantize_model(tiny_model(), CONFIGS[method], calibration=given, progress=False))
        for given in (calibration(asymmetric_targets=False), calibration())
    ]
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("epochs", [0, 2])
def test_a_run_that_was_cut_off_goes_on_with_the_same_targets(epochs, tmp_path):
    given = calibration(resume_folder=tmp_path / "blocks", finetune_epochs=epochs)
    whole = quantize_model(tiny_model(), CONFIGS["hqq"], calibration=given, progress=False).state_dict()
    (tmp_path / "blocks" / "model.layers.1.safetensors").unlink()
    resumed = quantize_model(tiny_model(), CONFIGS["hqq"], calibration=given, progress=False).state_dict()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_bfloat16_model_keeps_its_compute_dtype():
    model = quantize_model(tiny_model().to(torch.bfloat16), CONFIGS["hqq"], calibration=calibration(), progress=False)
    assert {layer.compute_dtype for layer in quantized_modules(model).values()} == {torch.bfloat16}


def test_a_block_that_cannot_be_copied_is_refused_and_nothing_has_changed():
    model = tiny_model()
    model.model.layers[0].held = (part for part in ())  # a generator
    with pytest.raises(ValueError, match=r"layers\.0: .*asymmetric_targets=False"):
        quantize_model(model, CONFIGS["hqq"], calibration=calibration(), progress=False)
    assert not quantized_modules(model)
    quantize_model(model, CONFIGS["hqq"], calibration=calibration(asymmetric_targets=False), progress=False)


def test_no_copy_of_a_block_stays(monkeypatch):
    alive: list[int] = []
    own, copies = unchanged_block._copy_of, []

    def watched(block: nn.Module, name: str) -> nn.Module:
        alive.append(sum(reference() is not None for reference in copies))
        made = own(block, name)
        copies.append(weakref.ref(made))
        return made

    monkeypatch.setattr(unchanged_block, "_copy_of", watched)
    quantize_model(tiny_model(), CONFIGS["hqq"], calibration=calibration(), progress=False)
    assert alive == [0, 0]
    assert not any(reference() is not None for reference in copies)


def test_by_default_a_float_model_has_them_and_a_merge_and_a_partly_quantized_model_do_not(caplog):
    def quantized(model, **fields):
        given = Calibration(data=IDS, n_tokens=640, sequence_length=40, **fields)
        return quantize_model(model, CONFIGS["hqq"], calibration=given, progress=False)

    found, expected, plain = (
        quantized(tiny_model(), **fields).state_dict()
        for fields in ({}, {"asymmetric_targets": True}, {"asymmetric_targets": False})
    )
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert not all(torch.equal(found[key], plain[key]) for key in found)
    assert "deviation_moment" not in wanted_statistics(Calibration(data=IDS))
    models = []
    for fields in ({}, {"asymmetric_targets": False}):
        model = tiny_model()
        first_block = HQQConfig(nbits=2, group_size=16, skip_modules=["layers.1"])
        quantize_model(model, first_block, progress=False)
        models.append(quantized(model, **fields).state_dict())
    assert "without asymmetric targets" in caplog.text
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


def test_a_partly_quantized_model_is_refused_where_they_are_asked_for():
    model = tiny_model()
    quantize_model(model, HQQConfig(nbits=2, group_size=16, skip_modules=["layers.1"]), progress=False)
    with pytest.raises(ValueError, match=r"asymmetric targets.*need the float model"):
        pql.quantize_model(model, CONFIGS["hqq"], calibration=calibration(), progress=False)
