"""Training roads: transformers' Trainer and add_adapter, PEFT's Auto classes, k-bit preparation, checkpointing."""

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, LoraQuantizedLinear

from .tiny import saved_tiny_model, tiny_model, token_ids, training_arguments

LORA = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


@pytest.fixture
def folder(tmp_path):
    """Folder of a saved quantized model."""
    model = pql.quantize_model(tiny_model(), HQQConfig(nbits=4, group_size=32), progress=False)
    model.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{tensor}": value.clone()
        for name, layer in pql.quantized_modules(model).items()
        for tensor, value in layer.quantized_weight.tensors.items()
    }


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = token_ids()
    return model(input_ids=ids, labels=ids).loss


def trained(model: nn.Module, steps: int = 20) -> tuple[float, float]:
    """Loss before and after a few steps of AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = loss_of(model).item()
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return first, loss_of(model).item()


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_trains_the_adapter_and_leaves_the_codes(bf16, folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA)
    before, codes = loss_of(model).item(), codes_of(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()] * 8
    arguments = training_arguments(tmp_path / "run", steps=20, bf16=bf16)
    Trainer(model, arguments, train_dataset=rows).train()
    assert loss_of(model).item() < 0.8 * before
    after = codes_of(model)
    assert all(torch.equal(after[name], codes[name]) for name in codes)
    reloaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run" / "checkpoint-20"
    )
    # The Trainer left autocast around the forward of its model.
    torch.testing.assert_close(loss_of(reloaded), loss_of(model.eval()), rtol=1e-3 if bf16 else 1e-5, atol=0)


def test_add_adapter_of_transformers_uses_our_layer_and_trains(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.add_adapter(LORA)
    assert type(model.model.layers[0].mlp.up_proj) is LoraQuantizedLinear
    first, last = trained(model)
    assert last < 0.8 * first


def test_auto_peft_model_loads_base_and_adapter(folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA)
    trained(model, steps=3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert type(loaded.base_model.model.model.layers[0].mlp.up_proj) is LoraQuantizedLinear
    torch.testing.assert_close(loss_of(loaded), loss_of(model.eval()))


def test_a_merged_model_saves_loads_and_takes_the_next_adapter(folder, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA)
    trained(model, steps=5)
    merged, report = pql.merge_back(model)
    assert len(report.layers) == len(pql.quantized_modules(merged)) == 14
    pql.save_model(merged, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(loss_of(loaded), loss_of(merged))
    first, last = trained(get_peft_model(loaded, LORA), steps=10)
    assert last < first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prepare", [pql.prepare_model_for_kbit_training, peft.prepare_model_for_kbit_training])
def test_both_kbit_preparations_leave_the_quantized_layers_alone_and_train(prepare, dtype, tmp_path):
    float_folder = saved_tiny_model(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(
        float_folder, dtype=dtype, quantization_config=HQQConfig(nbits=4, group_size=32)
    )
    codes = codes_of(model)
    model = prepare(model)
    assert model.is_gradient_checkpointing
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = codes_of(model)
    for name in codes:
        assert after[name].dtype == codes[name].dtype
        assert torch.equal(after[name], codes[name])
    is_ours = prepare is pql.prepare_model_for_kbit_training
    for outside in (model.model.norm, model.model.embed_tokens, model.lm_head):
        assert outside.weight.dtype == (torch.float32 if is_ours else dtype)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == dtype
    first, last = trained(get_peft_model(model, LORA))
    assert last < 0.8 * first


def test_kbit_preparation_can_keep_the_dtype_and_refuses_a_plain_model():
    model = pql.quantize_model(tiny_model().bfloat16(), HQQConfig(group_size=32), progress=False)
    pql.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False, upcast=False)
    assert model.model.norm.weight.dtype == torch.bfloat16
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="quantize_model"):
        pql.prepare_model_for_kbit_training(tiny_model())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant, folder):
    grads = []
    for is_checkpointed in (False, True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if is_checkpointed:
            kwargs = {"use_reentrant": use_reentrant}
            pql.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
        torch.manual_seed(0)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name])


def test_model_to_dtype_and_half_keep_the_codes_and_compute_in_the_new_dtype(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    codes = codes_of(model)
    expected = model(token_ids()).logits
    model.to(torch.bfloat16)
    assert all(torch.equal(value, codes[name]) for name, value in codes_of(model).items())
    logits = model(token_ids()).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() < 0.05 * expected.norm()


def test_the_whole_model_compiles_without_a_graph_break(folder):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LORA)
    expected = loss_of(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = token_ids()
    loss = compiled(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert model.base_model.model.model.layers[0].mlp.up_proj.lora_B["default"].weight.grad is not None
