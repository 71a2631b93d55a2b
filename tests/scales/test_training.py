"""Scale-only finetuning as a PEFT method: each role alone, dtypes, the Trainer, checkpointing, autocast, compiling."""

import peft
import pytest
import torch
from integrations.tiny import tiny_model, token_ids, training_arguments
from peft import PeftModel
from transformers import Trainer

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, QuantScalesConfig

from .tuned_models import (
    ALL,
    TENSORS,
    every_config,
    every_method,
    logits_of,
    loss_of,
    quantized,
    state_of,
    train_steps,
    trained_kinds,
    tuned,
)

pytestmark = pytest.mark.usefixtures("toy_method")


@pytest.mark.parametrize(("method", "role"), [(m, role) for m, roles in TENSORS.items() for role in roles])
def test_one_role_trains_its_tensors_alone_and_lowers_the_loss(method, role):
    model = tuned(quantized(method), (role,))
    assert trained_kinds(model) == TENSORS[method][role]
    before = state_of(model)
    first, last = train_steps(model)
    assert last < first - 0.01
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert changed == trained
    assert all("quant_scales_tensors.default" in name for name in trained)
    n_layers = len(pql.quantized_modules(model)) if role != "biases" else 8  # of the tiny Llama, attention has them
    assert len(trained) == n_layers


def test_norms_train_weight_and_bias_of_all_norm_layers():
    model = tuned(quantized(), ("norms",))
    assert trained_kinds(model) == {"weight"}
    assert sum(p.requires_grad for p in model.parameters()) == 5
    first, last = train_steps(model)
    assert last < first - 0.01
    gpt2 = tuned(pql.quantize_model(tiny_model("gpt2"), HQQConfig(group_size=32), progress=False), ("norms",))
    assert trained_kinds(gpt2) == {"weight", "bias"}
    assert sum(p.requires_grad for p in gpt2.parameters()) == 10


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_changes_no_bit_and_its_copies_are_float32(method, dtype):
    base = quantized(method, dtype)
    expected = logits_of(base)
    model = tuned(base, ALL[method])
    assert torch.equal(logits_of(model), expected)
    model.to(torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("bf16", [False, True])
@every_method
def test_the_trainer_trains_saves_and_reloads(method, bf16, tmp_path):
    model = tuned(quantized(method), ALL[method])
    before = loss_of(model).item()
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()] * 4
    arguments = training_arguments(tmp_path, steps=8, bf16=bf16)
    Trainer(model, arguments, train_dataset=rows).train()
    assert loss_of(model).item() < before - 0.1
    loaded = PeftModel.from_pretrained(quantized(method), tmp_path / "checkpoint-8")
    adapter = {name: p for name, p in model.named_parameters() if "quant_scales_tensors" in name}
    assert all(torch.equal(loaded.get_parameter(name), parameter) for name, parameter in adapter.items())


def test_add_adapter_of_transformers_trains_and_loads(tmp_path):
    model = quantized()
    model.add_adapter(QuantScalesConfig())
    first, last = train_steps(model)
    assert last < first
    model.save_pretrained(tmp_path)
    loaded = quantized()
    loaded.load_adapter(str(tmp_path))
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [pql.prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training])
@every_method
def test_both_kbit_preparations_combine_with_it(method, prepare, dtype):
    model = tuned(prepare(quantized(method, dtype)), ALL[method]).train()
    first, last = train_steps(model)
    assert last < first - 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_method
def test_gradient_checkpointing_gives_the_same_gradients(method, use_reentrant):
    grads = []
    for is_checkpointed in (False, True):
        base = quantized(method)
        if is_checkpointed:
            kwargs = {"use_reentrant": use_reentrant}
            pql.prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs=kwargs)
        model = tuned(base, ALL[method]).train()
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[1][name], grad)


@every_method
def test_gradients_are_those_of_the_loss(method):
    # Central differences of the loss along the gradient of each tensor, in float32: a step of 1 % of the tensor.
    model = tuned(quantized(method), ALL[method])
    loss_of(model).backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or "layers.0" not in name:
            continue
        direction = parameter.grad / parameter.grad.norm() * (float(parameter.detach().norm()) or 0.1) * 0.01
        with torch.no_grad():
            parameter += direction
            above = loss_of(model)
            parameter -= 2 * direction
            below = loss_of(model)
            parameter += direction
        slope = (parameter.grad * direction).sum()
        torch.testing.assert_close((above - below) / 2, slope, rtol=0.05, atol=1e-5, msg=name)


def test_autocast_trains_it():
    model = tuned(quantized(), ALL["hqq"])
    expected = loss_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_it_compiles_without_a_graph_break():
    model = tuned(quantized(), ALL["hqq"])
    expected = loss_of(model)
    loss = torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=token_ids(), labels=token_ids()).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
