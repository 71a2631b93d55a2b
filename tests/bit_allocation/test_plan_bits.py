"""Plans of bits: exact in bytes, measured beside predicted, saved and read, refused before anything is changed."""

import json
import logging

import pytest
import torch
from integrations.tiny import tiny_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, BitPlan, Calibration, HQQConfig, plan_bits, quantize_model
from peft_quantlayers.bit_allocation.fisher_gradients import sampled_gradients
from peft_quantlayers.calibration.model_calls import model_calls
from peft_quantlayers.layers.quantized_layers import quantized_layers

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
DATA = Calibration(data=IDS, n_tokens=640, sequence_length=40)
CONFIG = HQQConfig(nbits=3, group_size=16)


def sharp(family: str = "llama") -> nn.Module:
    """A tiny model whose predictions depend on the tokens: random weights alone predict nothing."""
    model = tiny_model(family)
    model.get_output_embeddings().weight.data.mul_(20)
    return model


def stored_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for layer in quantized_layers(model).values() for t in layer.quantized_weight.tensors.values())


def mixture() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma3", "bert", "mixture"])
def test_bytes_are_those_of_the_quantized_model(family):
    model = mixture() if family == "mixture" else tiny_model(family)
    plan = plan_bits(model, DATA, average=5.0, config=CONFIG, progress=False)
    assert not quantized_layers(model)
    assert plan.bits_per_weight <= 5.0
    quantize_model(model, CONFIG, budget=plan, progress=False)
    assert stored_bytes(model) == plan.n_bytes
    tensors = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}
    assert sum(tensor.nbytes for tensor in tensors.values()) == plan.model_bytes
    assert len({layer.spec.nbits for layer in quantized_layers(model).values()}) > 1


def test_the_prediction_is_the_divergence_of_a_layer_that_is_changed():
    """Against the divergence itself, measured with each layer's own quantized weight in the float model."""
    plan = plan_bits(sharp(), DATA, average=5.0, config=CONFIG, progress=False)
    predicted, measured = [], []
    for name in list(plan.layers)[::2]:
        model, reference = sharp(), sharp()
        skipped = [other for other in plan.layers if other != name]
        quantize_model(
            model, HQQConfig(nbits=2, group_size=16, skip_modules=skipped), calibration=DATA, progress=False
        )
        with torch.no_grad():
            theirs, ours = (each(IDS).logits.log_softmax(-1) for each in (reference, model))
        measured.append(float((theirs.exp() * (theirs - ours)).sum(-1).mean()))
        predicted.append(next(choice.kl for choice in plan.layers[name] if choice.fields == {"nbits": 2}))
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios


def test_more_bits_cost_less_and_a_plan_beats_the_same_bits_everywhere():
    plan = plan_bits(sharp(), DATA, average=5.0, config=CONFIG, progress=False)
    for choices in plan.layers.values():
        costs = [choice.kl for choice in sorted(choices, key=lambda choice: choice.n_bytes)]
        assert costs == sorted(costs, reverse=True)
    uniform = sum(choice.kl for each in plan.layers.values() for choice in each if choice.fields == {"nbits": 3})
    same = plan.with_budget(average=5.0)
    assert same.overrides == plan.overrides
    assert plan.predicted_kl < uniform
    assert plan.with_budget(average=5.5).predicted_kl < plan.predicted_kl


def test_a_plan_is_measured_logged_saved_and_read(tmp_path, caplog):
    model = sharp()
    plan = plan_bits(model, DATA, average=5.0, config=CONFIG, progress=False)
    assert plan.measured_kl is None
    with caplog.at_level(logging.INFO):
        quantize_model(model, CONFIG, calibration=DATA, budget=plan, progress=False)
    assert 0.3 < plan.measured_kl / plan.predicted_kl < 3
    assert f"predicted KL {plan.predicted_kl:.4f}, measured {plan.measured_kl:.4f}" in caplog.text
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == plan
    document = json.loads((tmp_path / "plan.json").read_text())
    assert document["bits_per_weight"] == plan.bits_per_weight
    pql.save_model(model, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_a_budget_alone_plans_and_quantizes_and_overrides_do_the_same():
    planned = quantize_model(tiny_model(), CONFIG, calibration=DATA, budget=5.0, progress=False)
    plan = plan_bits(tiny_model(), DATA, average=5.0, config=CONFIG, progress=False)
    config = HQQConfig(nbits=3, group_size=16, overrides=plan.overrides)
    by_hand = quantize_model(tiny_model(), config, calibration=DATA, progress=False).state_dict()
    assert all(torch.equal(tensor, by_hand[key]) for key, tensor in planned.state_dict().items())


def test_a_saved_plan_goes_into_quantize_model_and_from_files_to_files(tmp_path):
    plan = plan_bits(tiny_model(), DATA, average=5.0, config=CONFIG, progress=False)
    plan.save(tmp_path / "plan.json")
    in_memory = quantize_model(tiny_model(), CONFIG, calibration=DATA, budget=tmp_path / "plan.json", progress=False)
    tiny_model().save_pretrained(tmp_path / "float")
    for budget, folder in ((plan, "one"), (str(tmp_path / "plan.json"), "two")):
        pql.quantize_checkpoint(
            tmp_path / "float", tmp_path / folder, CONFIG, calibration=DATA, budget=budget, progress=False
        )
        loaded = type(in_memory).from_pretrained(tmp_path / folder).state_dict()
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in in_memory.state_dict().items())


def test_files_take_a_plan_only_and_one_that_fits_the_model(tmp_path):
    tiny_model().save_pretrained(tmp_path / "float")
    plan = plan_bits(tiny_model("gpt2"), DATA, average=6.0, config=CONFIG, progress=False)
    for budget, message in (
        (3.5, "plan that was made before"),
        ("4GB", "plan that was made"),
        (plan, "matches no module"),
    ):
        with pytest.raises(ValueError, match=message):
            pql.quantize_checkpoint(tmp_path / "float", tmp_path / "out", CONFIG, budget=budget, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_size_counts_the_whole_model():
    size = plan_bits(tiny_model(), DATA, average=5.0, config=CONFIG, progress=False).model_bytes
    for given in (size, f"{size / 1000}KB"):
        plan = plan_bits(tiny_model(), DATA, size=given, config=CONFIG, progress=False)
        assert size - 2000 < plan.model_bytes <= size


@pytest.mark.parametrize(
    ("config", "choices"),
    # By hand: the choices are fields of one method each.
    [
        (AQLMConfig(nbits_per_codebook=4, rounds=1), [1, 2]),
        (HQQConfig(nbits=3, group_size=16), [{"nbits": 2, "group_size": 32}, {"nbits": 3, "group_size": 16}]),
        (pql.NF4Config(), [{"block_size": 32}, {"block_size": 16}]),
    ],
    ids=["aqlm", "groups", "nf4"],
)
def test_other_methods_and_fields(config, choices):
    model = tiny_model()
    largest = plan_bits(model, DATA, average=32.0, config=config, choices=choices, progress=False)
    smallest = min(choice.n_bytes for choice in next(iter(largest.layers.values())))
    assert smallest > 0
    plan = largest.with_budget(average=0.5 * (largest.bits_per_weight + _least(largest)))
    quantize_model(model, config, budget=plan, progress=False)
    assert stored_bytes(model) == plan.n_bytes < largest.n_bytes


def _least(plan: BitPlan) -> float:
    return 8 * sum(min(choice.n_bytes for choice in each) for each in plan.layers.values()) / plan.n_weights


def test_layers_with_an_override_of_their_own_keep_it():
    config = HQQConfig(nbits=3, group_size=16, overrides={"down_proj": {"nbits": 8}})
    plan = plan_bits(tiny_model(), DATA, average=6.0, config=config, progress=False)
    assert not any("down_proj" in name for name in plan.overrides)
    model = quantize_model(tiny_model(), config, budget=plan, progress=False)
    assert {layer.spec.nbits for name, layer in quantized_layers(model).items() if "down_proj" in name} == {8}
    assert stored_bytes(model) == plan.n_bytes


def test_gradients_leave_the_model_as_it_was():
    model = tiny_model().train()
    next(model.parameters()).requires_grad_(False)
    before = [(p.requires_grad, p.detach().clone()) for p in model.parameters()]
    found = sampled_gradients(model, model_calls(model, DATA.batches(model)), ["model.layers.0.mlp.up_proj"])
    assert model.training
    assert all(
        p.requires_grad == required and torch.equal(p, value) and p.grad is None
        for p, (required, value) in zip(model.parameters(), before, strict=True)
    )
    samples = found["model.layers.0.mlp.up_proj"]
    assert torch.cat(samples.inputs).shape == torch.cat(samples.gradients)[:, :64].shape
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, TypeError, "needs one budget"),
        ({"average": 3.0, "size": "4GB"}, TypeError, "needs one budget"),
        ({"average": 1.0}, ValueError, r"average=1.0 cannot be met.*takes 4\.000 bits per weight"),
        ({"size": "1KB"}, ValueError, "size='1KB' cannot be met"),
        ({"size": "four"}, ValueError, "is no size"),
        ({"average": True}, TypeError, "average must be a number"),
        ({"average": 5.0, "choices": []}, TypeError, "choices must be a list"),
        ({"average": 5.0, "choices": {"nbits": 3}}, TypeError, "choices must be a list"),
        ({"average": 5.0, "choices": [{"bits": 3}]}, ValueError, r"choices name \['bits'\]"),
        ({"average": 5.0, "choices": [17]}, ValueError, "nbits"),
        ({"average": 5.0, "config": "hqq"}, TypeError, "config must be"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, error, message):
    model = tiny_model()
    with pytest.raises(error, match=message):
        plan_bits(model, DATA, progress=False, **({"config": CONFIG} | arguments))
    assert not quantized_layers(model)


def test_a_budget_that_makes_no_sense_is_refused_and_a_model_without_logits_too(tmp_path):
    for budget, error, message in (
        (3.5, ValueError, "needs calibration data"),
        ([3], TypeError, "budget must be"),
        (True, TypeError, "budget must be"),
    ):
        with pytest.raises(error, match=message):
            quantize_model(tiny_model(), CONFIG, budget=budget, progress=False)
    with pytest.raises(TypeError, match="gives no logits"):
        plan_bits(tiny_model().model, DATA, average=5.0, config=CONFIG, progress=False)
    (tmp_path / "plan.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="is no plan of bits"):
        BitPlan.load(tmp_path / "plan.json")
