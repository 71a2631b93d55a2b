"""Rotated HQQ: outliers in weights and inputs, adapters and merges in the unrotated basis, and what it refuses."""

import copy
from pathlib import Path

import pytest
import torch
from integrations.tiny import tiny_model, token_ids
from llama_cpp_converter import ensure_converter
from mixtures import tiny_mixture
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.methods import get_method
from peft_quantlayers.methods.rotated_hqq import RotatedHQQSpec

METHOD, PLAIN = get_method("rotated_hqq"), get_method("hqq")
DOWN_ONLY = {"rotate_inputs": False, "overrides": {"down_proj": {"rotate_inputs": True}}}


def relative(error: Tensor, wanted: Tensor) -> float:
    return float(error.norm() / wanted.norm())


def with_outliers(n: int, features: int) -> Tensor:
    """(n, features), of which two channels are thirty times as large."""
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(1))
    x[:, [5, features // 2]] *= 30
    return x


def test_the_layers_weight_is_the_one_before_the_rotation():
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    stored = METHOD.quantize(weight, RotatedHQQSpec(nbits=8, group_size=32))
    dense = METHOD.dequantize(stored)
    assert relative(dense - weight, weight) < 0.01
    x = with_outliers(5, 96)
    torch.testing.assert_close(METHOD.linear(x, stored, None), x @ dense.t(), atol=1e-3, rtol=1e-4)
    assert relative(PLAIN.dequantize(stored) - weight, weight) > 1, "the stored tensors are of another basis"


def test_channels_beside_outliers_lose_less():
    weight = with_outliers(32, 576)
    beside = [column for column in range(576) if weight[:, column].norm() < 30]
    errors = {}
    # By hand: the same bits with and without a rotation.
    for method, spec in ((PLAIN, pql.HQQSpec(nbits=3)), (METHOD, RotatedHQQSpec(nbits=3))):
        error = method.dequantize(method.quantize(weight, spec)) - weight
        errors[spec.method] = relative(error[:, beside], weight[:, beside])
    assert errors["rotated_hqq"] < 0.75 * errors["hqq"]


def test_inputs_are_rounded_after_the_rotation():
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(576, 96), nn.Linear(96, 8))
    x, errors = with_outliers(1, 576), {}
    # By hand: the same bits with and without a rotation.
    for config in (pql.HQQConfig(nbits=4), pql.RotatedHQQConfig(nbits=4)):
        model = pql.quantize_model(copy.deepcopy(linear), config, progress=False).eval()
        with torch.no_grad():
            exact = model(x)
            pql.set_activation_bits(model, 8)
            errors[config.method] = relative(model(x) - exact, exact)
    assert 0 < errors["rotated_hqq"] < errors["hqq"]


def test_only_some_layers_can_be_rotated_and_a_saved_model_is_the_same(tmp_path: Path):
    model = pql.quantize_model(tiny_model(), pql.RotatedHQQConfig(nbits=3, group_size=16, **DOWN_ONLY), progress=False)
    rotated = {
        name.rpartition(".")[2] for name, each in pql.quantized_modules(model).items() if each.spec.rotate_inputs
    }
    assert rotated == {"down_proj"}
    up = model.model.layers[0].mlp.up_proj
    as_hqq = pql.quantize_model(tiny_model(), pql.HQQConfig(nbits=3, group_size=16), progress=False)
    assert torch.equal(up.weight, as_hqq.model.layers[0].mlp.up_proj.weight)
    with torch.no_grad():
        before = model(token_ids()).logits
    pql.save_model(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, before)


@pytest.mark.parametrize("strategy", ["requantize", "auto"])
def test_an_adapter_is_merged_into_the_rotated_basis(strategy: str):
    torch.manual_seed(0)
    base = pql.quantize_model(tiny_model(), pql.RotatedHQQConfig(nbits=8, group_size=16), progress=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["down_proj", "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape)
    with torch.no_grad():
        adapted = model(token_ids()).logits
        with model.disable_adapter():
            plain = model(token_ids()).logits
        merged, _ = pql.merge_back(model, strategy=strategy, progress=False)
        assert relative(merged(token_ids()).logits - adapted, adapted - plain) < 0.1
    assert all(layer.spec.rotate_inputs for layer in pql.quantized_modules(merged).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_trained_merge_aware_is_what_the_merged_layer_computes(dtype: torch.dtype):
    torch.manual_seed(0)
    base = pql.quantize_model(tiny_model().to(dtype), pql.RotatedHQQConfig(nbits=3, group_size=16), progress=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["down_proj", "q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape)
    pql.enable_merge_aware(model)
    model(token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for n, p in model.named_parameters() if "lora" in n)
    with torch.no_grad():
        trained = model.eval()(token_ids()).logits
        merged, _ = pql.merge_back(model, strategy="aware", progress=False)
        error = relative(merged(token_ids()).logits - trained, trained)
    assert error == 0 if dtype != torch.float32 else error < 1e-6


def test_gradients_of_merge_aware_factors_are_those_of_a_plain_delta():
    generator = torch.Generator().manual_seed(0)
    stored = METHOD.quantize(torch.randn(24, 96, generator=generator), RotatedHQQSpec(nbits=8, group_size=32))
    left, right = torch.randn(24, 3, generator=generator), torch.randn(3, 96, generator=generator)
    x, grad = with_outliers(5, 96), torch.randn(5, 24, generator=generator)
    dense, found = METHOD.dequantize(stored), []
    for product in (
        lambda x, a, b: METHOD.merged_linear(x, stored, a, b, None),
        lambda x, a, b: x @ (dense + a @ b).t(),
    ):
        leaves = [each.clone().requires_grad_() for each in (x, 0.1 * left, 0.1 * right)]
        found.append(torch.autograd.grad(product(*leaves), leaves, grad))
    for ours, plain in zip(*found, strict=True):
        assert relative(ours - plain, plain) < 0.01


def test_on_the_meta_device_it_has_shapes():
    model = pql.quantize_model(tiny_model(), pql.RotatedHQQConfig(group_size=16), progress=False).to("meta")
    assert model(token_ids().to("meta")).logits.shape == (2, 9, 128)
    assert model.model.layers[0].mlp.down_proj.dequantize().is_meta


def test_rotations_before_the_quantizer_are_learned_beside_rotated_layers():
    data = pql.Calibration(data=token_ids().repeat(16, 1), n_tokens=128, sequence_length=9)
    transform = pql.Rotation(kind="learned", steps=2)
    config = pql.RotatedHQQConfig(nbits=3, group_size=16, **DOWN_ONLY)
    model = pql.quantize_model(tiny_model(), config, transforms=transform, calibration=data, progress=False)
    assert len(pql.quantized_modules(model)) == 14
    all_rotated = pql.RotatedHQQConfig(nbits=3, group_size=16)
    with pytest.raises(ValueError, match="rounded to HQQ's grid"):
        pql.quantize_model(tiny_model(), all_rotated, transforms=transform, calibration=data, progress=False)


def test_a_mixtures_experts_rotate_their_own_inputs():
    dense = tiny_mixture("mixtral")
    with torch.no_grad():
        wanted = dense(token_ids()).logits
    model = pql.quantize_model(dense, pql.RotatedHQQConfig(nbits=8, group_size=16), progress=False)
    assert pql.quantized_stacks(model)
    inputs = model.get_input_embeddings()(token_ids()).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    assert relative(logits - wanted, wanted) < 0.05
    logits.square().sum().backward()
    plain = pql.dequantize_model(model)
    again = inputs.detach().requires_grad_()
    plain(inputs_embeds=again).logits.square().sum().backward()
    torch.testing.assert_close(inputs.grad, again.grad, atol=1e-4, rtol=1e-3)


def test_a_layer_whose_width_has_no_rotation_stays_unrotated():
    spec = RotatedHQQSpec(group_size=2)
    assert spec.fitted(16, 38).rotate_inputs is False
    assert spec.fitted(16, 40) == spec
    with pytest.raises(ValueError, match=r"in_features=38 is not a multiple of 4.*Use rotate_inputs=False"):
        METHOD.quantize(torch.randn(16, 38), spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis": 0}, "leave axis=1"),
        ({"export_target": "mlx"}, "quantize with HQQConfig"),
        ({"rotate_inputs": 1}, "rotate_inputs"),
    ],
)
def test_what_it_refuses(fields: dict, message: str):
    with pytest.raises((TypeError, ValueError), match=message):
        pql.RotatedHQQConfig(**fields)


def test_qa_lora_is_refused_for_rotated_layers():
    with pytest.raises(NotImplementedError, match=r"are rotated\. Quantize with HQQConfig"):
        METHOD.group_delta_size(RotatedHQQSpec(), in_features=64)
    assert METHOD.group_delta_size(RotatedHQQSpec(rotate_inputs=False), in_features=64) == 64


def test_no_engine_holds_it_but_a_dense_export_does(tmp_path: Path):
    ensure_converter()  # without which gguf is refused for another reason
    model = pql.quantize_model(tiny_model(), pql.RotatedHQQConfig(group_size=16), progress=False)
    for engine_format in ("gguf", "mlx", "compressed-tensors", "hqq"):
        with pytest.raises(ValueError, match=r"rotated_hqq weights[\s\S]*format='dense'"):
            pql.export(model, tmp_path / engine_format, engine_format)
        assert not (tmp_path / engine_format).exists()
    report = pql.export(model, tmp_path / "requantized", "compressed-tensors", approximate="requantize")
    assert {each.stored_as for each in report.layers} == {"4 bits in groups of 16"}
    pql.export(model, tmp_path / "dense", "dense")
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(token_ids()).logits
        torch.testing.assert_close(served, model(token_ids()).logits, atol=1e-4, rtol=1e-3)
