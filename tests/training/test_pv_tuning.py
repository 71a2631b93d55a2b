"""Training AQLM models with their codes: lower loss than without, within the bounds that were asked for."""

import copy
from collections import Counter

import pytest
import torch
from integrations.tiny import tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig, PVTuner


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    config = AQLMConfig(nbits_per_codebook=6, rounds=1)
    return pql.quantize_model(tiny_model(), config, progress=False)


@pytest.fixture
def model(quantized) -> nn.Module:
    return copy.deepcopy(quantized)


def tuner_of(model: nn.Module, **options) -> PVTuner:
    """With a trust ratio that lets one of the few groups of a tiny layer move."""
    return PVTuner(model, **{"trust_ratio": 0.05} | options)


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(input_ids=token_ids(), labels=token_ids()).loss


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.codes.clone() for name, layer in pql.quantized_modules(model).items()}


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def losses_of(model: nn.Module, steps: int, **options) -> list[float]:
    tuner = tuner_of(model, lr=1e-3, **options)
    losses = []
    for _ in range(steps):
        loss = loss_of(model)
        loss.backward()
        tuner.step()
        tuner.zero_grad()
        losses.append(loss.item())
    tuner.close()
    return losses


def test_the_loss_falls_further_with_codes_than_without(quantized):
    alone, codes = copy.deepcopy(quantized), copy.deepcopy(quantized)
    before = codes_of(alone)
    without = losses_of(alone, 20, code_lr=0.0)
    with_codes = losses_of(codes, 20, code_lr=0.5, trust_ratio=0.1)
    assert without[0] == with_codes[0]
    assert without[-1] < without[0] - 0.2
    assert with_codes[-1] < without[-1] - 0.1
    assert all(torch.equal(value, before[name]) for name, value in codes_of(alone).items())
    assert any(not torch.equal(value, before[name]) for name, value in codes_of(codes).items())


def test_no_step_changes_more_groups_than_allowed(model):
    tuner = tuner_of(model, max_code_change=0.02)
    n_changed = 0
    for _ in range(5):
        before = codes_of(model)
        loss_of(model).backward()
        tuner.step()
        tuner.zero_grad()
        for name, codes in codes_of(model).items():
            changed = (codes != before[name]).any(-1)
            assert changed.sum() == tuner.changed_groups[name] <= 0.02 * changed.numel()
            n_changed += int(changed.sum())
    assert n_changed > 0


def test_small_buffers_give_each_layer_its_turn(model):
    layers = pql.quantized_modules(model)
    largest = max(4 * layer.in_features * layer.out_features for layer in layers.values())
    tuner = tuner_of(model, buffer_bytes=2 * largest)
    seen = []
    for _ in range(10):
        held = []
        for _ in range(2):  # two backward passes add up
            loss_of(model).backward()
            held.append(sum(gradient.nbytes for gradient in tuner._gradients.values()))
        assert held[0] == held[1] <= 2 * largest
        tuner.step()
        tuner.zero_grad()
        assert not tuner._gradients
        seen += tuner.changed_groups
    assert tuner.peak_buffer_bytes <= 2 * largest
    turns = Counter(seen)
    assert turns.keys() == layers.keys()
    assert max(turns.values()) - min(turns.values()) <= 1


def test_collected_gradients_are_those_of_the_dense_weight(model):
    tuner = tuner_of(model)
    loss_of(model).backward()
    loss_of(model).backward()
    dense = pql.dequantize_model(copy.deepcopy(model))
    for name in tuner.layers:
        dense.get_submodule(name).weight.requires_grad_(True)
    (2 * loss_of(dense)).backward()
    assert tuner._gradients.keys() == tuner.layers.keys()
    for name, gradient in tuner._gradients.items():
        torch.testing.assert_close(gradient, dense.get_submodule(name).weight.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_collects_the_same_gradients(quantized, use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        model = copy.deepcopy(quantized).train()
        if is_checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        tuner = tuner_of(model)
        loss_of(model).backward()
        gradients.append(dict(tuner._gradients))
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_two_runs_give_the_same_bits(quantized):
    first, second = copy.deepcopy(quantized), copy.deepcopy(quantized)
    assert losses_of(first, 5) == losses_of(second, 5)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_run_goes_on_from_its_state(quantized):
    through, stopped = copy.deepcopy(quantized), copy.deepcopy(quantized)
    options = {"buffer_bytes": 2 * 4 * 64 * 96}

    def run(tuner: PVTuner, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            loss_of(model).backward()
            tuner.step()
            tuner.zero_grad()

    run(tuner_of(through, **options), through, 6)
    first = tuner_of(stopped, **options)
    run(first, stopped, 3)
    state = copy.deepcopy(first.state_dict())
    first.close()
    second = tuner_of(stopped, **options)
    second.load_state_dict(state)
    run(second, stopped, 3)
    expected = through.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stopped.state_dict().items())


def test_a_trained_model_is_closed_saved_and_loaded(model, tmp_path):
    losses_of(model, 3)
    assert not any(layer._forward_hooks for layer in pql.quantized_modules(model).values())
    assert not any(layer.codebooks.requires_grad for layer in pql.quantized_modules(model).values())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loss_of(loaded), loss_of(model))


def test_the_trainer_takes_it_as_its_optimizer(model, tmp_path):
    before, codes = loss_of(model).item(), codes_of(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()] * 4
    arguments = TrainingArguments(
        tmp_path, max_steps=5, per_device_train_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=rows)
    tuner = tuner_of(model, lr=1e-3)
    Trainer(model, arguments, train_dataset=rows, optimizers=(tuner, None)).train()
    assert loss_of(model).item() < before - 0.1
    assert any(not torch.equal(value, codes[name]) for name, value in codes_of(model).items())
    tuner.close()
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments, train_dataset=rows)


def test_a_broken_gradient_changes_nothing(model):
    tuner = tuner_of(model)
    loss_of(model).backward()
    tuner._gradients["model.layers.1.mlp.up_proj"][0, 0] = float("nan")
    state = state_of(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj.*NaN or Inf"):
        tuner.step()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"code_lr": -1.0}, "code_lr=-1.0 must lie above 0"),
        ({"code_lr": float("nan")}, "code_lr=nan"),
        ({"max_code_change": 0.0}, "max_code_change=0.0 must lie above 0"),
        ({"trust_ratio": 1.5}, "trust_ratio=1.5"),
        ({"buffer_bytes": 1000}, r"gate_proj.*24576 bytes.*buffer_bytes=1000"),
        ({"lr": -1.0}, "lr=-1.0 must lie above 0"),
    ],
)
def test_wrong_options_are_refused_and_the_model_left_as_it_was(model, options, message):
    state = state_of(model)
    with pytest.raises(ValueError, match=message):
        PVTuner(model, **options)
    assert all(tensor.dtype == state[name].dtype for name, tensor in model.state_dict().items())
    layers = pql.quantized_modules(model).values()
    assert not any(layer.codebooks.requires_grad or layer._forward_hooks for layer in layers)


def test_a_model_without_aqlm_layers_is_refused():
    model = pql.quantize_model(tiny_model(), HQQConfig(group_size=32), progress=False)
    with pytest.raises(ValueError, match=r"no AQLM layer.*AQLMConfig"):
        PVTuner(model)
