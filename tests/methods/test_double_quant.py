"""HQQ with scales and zeros in 8 bits: half their bits, the same quality, and the same weight wherever it goes."""

import json

import pytest
import torch
from integrations.tiny import tiny_model, token_ids
from mixtures import tiny_mixture
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, HQQSpec
from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.layers import QuantizedEmbedding, QuantizedLinear
from peft_quantlayers.layers.quantized_layers import quantized_layers
from peft_quantlayers.methods import get_method

HQQ = get_method("hqq")


def heavy_tailed(rows: int = 128, columns: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    return weight * torch.rand(rows, columns, generator=generator).exp() ** 2 * 0.02


def error(weight: torch.Tensor, quantized: QuantizedWeight, hessian: torch.Tensor | None = None) -> float:
    lost = HQQ.dequantize(quantized) - weight
    return float(lost.square().sum() if hessian is None else ((lost @ hessian) * lost).sum())


def test_small_groups_take_the_bits_of_plain_groups_of_64():
    for size, group_size in ((576, 48), (2048, 32), (4096, 32), (8192, 32)):
        double = HQQSpec(nbits=3, group_size=group_size, double_quant=True).bits_per_weight(size, size)[1]
        assert double <= HQQSpec(nbits=3, group_size=64).bits_per_weight(size, size)[1] + 0.035
    assert HQQSpec(nbits=3, group_size=64, double_quant=True).bits_per_weight(4096, 4096)[1] < 3.27


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("is_calibrated", [False, True])
@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_it_loses_next_to_nothing(nbits, is_calibrated, symmetric):
    weight, hessian = heavy_tailed(), None
    if is_calibrated:
        inputs = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 2, 256)
        hessian = inputs.t() @ inputs / 512 + 0.1 * torch.eye(256)
    specs = [HQQSpec(nbits=nbits, group_size=32, symmetric=symmetric, double_quant=each) for each in (False, True)]
    plain, double = (HQQ.quantize(weight, spec, hessian=hessian) for spec in specs)
    assert double.spec == specs[1]
    assert set(double.tensors) == {"W_q"} | {
        f"{name}{part}"
        for name in (["scale"] if symmetric else ["scale", "zero"])
        for part in ("", "_step", "_offset")
    }
    assert error(weight, double, hessian) < 1.04 * error(weight, plain, hessian)
    large = HQQ.quantize(weight, HQQSpec(nbits=nbits, group_size=64, symmetric=symmetric), hessian=hessian)
    assert error(weight, double, hessian) < error(weight, large, hessian)


@pytest.mark.parametrize(("offset", "spread"), [(1e4, 1e-3), (5.0, 1e-2)])
def test_rows_that_eight_bits_cannot_hold_are_stored_without(offset, spread, caplog):
    weight = heavy_tailed()
    weight[3, :32] = offset + weight[3, :32] * spread  # a group whose scale or zero is far from all others
    for hessian in (None, torch.eye(256)):
        found = HQQ.quantize(weight, HQQSpec(nbits=4, group_size=32, double_quant=True), hessian=hessian)
        assert not found.spec.double_quant
    layer = nn.Sequential(nn.Linear(256, 128))
    layer[0].weight.data = weight
    pql.quantize_model(layer, HQQConfig(nbits=4, group_size=32, double_quant=True), progress=False)
    assert "0: 8 bits cannot hold the scales" in caplog.text
    with pytest.raises(ValueError, match="all 1 layers are quantized already as the config says"):
        pql.quantize_model(layer, HQQConfig(nbits=4, group_size=32, double_quant=True), progress=False)


def test_it_is_exactly_a_plain_weight_and_its_layer_computes_with_that():
    weight = HQQ.quantize(heavy_tailed(), HQQSpec(nbits=3, group_size=32, double_quant=True))
    plain = HQQ.with_plain_metadata(weight)
    assert not plain.spec.double_quant
    assert plain.tensors["scale"].dtype == torch.float16
    assert torch.equal(HQQ.dequantize(weight), HQQ.dequantize(plain))
    x = torch.randn(5, 256)
    assert torch.equal(HQQ.linear(x, weight, None), HQQ.linear(x, plain, None))
    rows = weight.rows(slice(32, 64))
    assert torch.equal(HQQ.dequantize(rows), HQQ.dequantize(weight)[32:64])
    again = HQQ.quantize(HQQ.dequantize(weight), weight.spec, start=weight)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in weight.tensors.items())


def test_gradients_reach_steps_and_offsets():
    weight = HQQ.quantize(heavy_tailed(), HQQSpec(nbits=3, group_size=32, double_quant=True, scale_dtype="float32"))
    roles = weight.spec.trainable_roles(128, 256)
    assert roles == {"scale_step": "scales", "scale_offset": "scales", "zero_step": "zeros", "zero_offset": "zeros"}
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(2))
    found = []
    for product in (lambda: HQQ.linear(x, weight, None), lambda: x @ HQQ.dequantize(weight).t()):
        parameters = [weight.tensors[name].detach().requires_grad_() for name in roles]
        weight.tensors.update(dict(zip(roles, parameters, strict=True)))
        found.append(torch.autograd.grad(product().square().sum(), parameters))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        assert ours.any()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gemma3"])
def test_a_model_is_saved_loaded_trained_and_merged(family, tmp_path):
    model = pql.quantize_model(
        tiny_model(family), HQQConfig(nbits=4, group_size=16, double_quant=True), progress=False
    )
    assert all(layer.spec.double_quant for layer in quantized_layers(model).values())
    expected = model(token_ids()).logits
    pql.save_model(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 7
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert torch.equal(loaded(token_ids()).logits, expected)
    assert pql.verify_model(tmp_path / "model") == []
    peft_model = get_peft_model(loaded, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    peft_model(token_ids()).logits.sum().backward()
    with pytest.raises(ValueError, match="exact"):
        pql.merge_back(peft_model, strategy="exact", progress=False)
    merged, _ = pql.merge_back(peft_model, unload=False, progress=False)
    with torch.no_grad():
        assert not torch.equal(merged(token_ids()).logits, expected)
    merged.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())


def test_tuned_scales_merge_exactly():
    model = pql.quantize_model(tiny_model(), HQQConfig(nbits=4, group_size=16, double_quant=True), progress=False)
    tuned = get_peft_model(model, pql.QuantScalesConfig(train=("scales", "zeros")))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data *= 1.01
    with torch.no_grad():
        expected = tuned(token_ids()).logits
        merged = tuned.merge_and_unload()
        torch.testing.assert_close(merged(token_ids()).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["mlx", "hqq", "dense"])
def test_exports_write_the_same_as_of_the_plain_weight(target, tmp_path):
    config = HQQConfig(nbits=4, group_size=32, double_quant=True)
    model = pql.quantize_model(tiny_model(), config, progress=False)
    pql.save_model(model, tmp_path / "double")
    plain = pql.quantize_model(tiny_model(), HQQConfig(nbits=4, group_size=32), progress=False)
    for name, layer in quantized_layers(plain).items():
        layer.quantized_weight = HQQ.with_plain_metadata(model.get_submodule(name).quantized_weight)
    pql.save_model(plain, tmp_path / "plain")
    files = []
    for name in ("double", "plain"):
        pql.export(tmp_path / name, tmp_path / f"{name}-{target}", target)
        found = sorted((tmp_path / f"{name}-{target}").rglob("*.safetensors"))
        files.append([file.read_bytes() for file in found])
    assert files[0]
    assert files[0] == files[1]


def test_experts_are_stored_so_too(tmp_path):
    model = tiny_mixture("mixtral")
    x = token_ids()
    pql.quantize_model(model, HQQConfig(nbits=4, group_size=16, double_quant=True), progress=False)
    assert pql.quantized_stacks(model)
    pql.save_model(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model(x).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"axis": 0}, "needs axis=1"),
        ({"nbits": 8}, "nbits up to 4"),
        ({"integer_zero": True}, "float or symmetric zeros"),
        ({"export_target": "mlx"}, "plain scales"),
        ({"double_quant": 2}, "double_quant"),
    ],
)
def test_what_eight_bits_are_not_for_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HQQConfig(**{"nbits": 4, "group_size": 32, "double_quant": True} | fields)


def row_for_float_scales(in_features: int) -> torch.Tensor:
    """A row whose groups are so different that 8 bits cannot hold their scales."""
    row = 0.02 * torch.randn(in_features)
    row[-64:] *= 1000
    return row


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_stay_as_they_are_where_another_one_needs_plain_scales(symmetric):
    torch.manual_seed(0)
    spec = HQQSpec(nbits=4, group_size=64, double_quant=True, symmetric=symmetric)
    table = QuantizedEmbedding.from_embedding(nn.Embedding(64, 512), spec)
    before, new = table.dequantize(), row_for_float_scales(512)
    table.weight[3] = new
    after = table.dequantize()
    assert not table.spec.double_quant
    assert torch.equal(after[4:], before[4:])
    assert (after[3] - new).norm() < 0.2 * new.norm()
    assert {name for name, _ in table.named_parameters()} == set(table.spec.tensor_layout(64, 512))
    table.quantized_weight.check("table")


def test_rows_of_another_layout_are_refused():
    torch.manual_seed(0)
    narrow, plain = (
        QuantizedLinear.from_linear(nn.Linear(64, 4), HQQSpec(nbits=4, double_quant=each)).quantized_weight
        for each in (True, False)
    )
    with pytest.raises(ValueError, match="cannot lie in a weight"):
        narrow.with_rows(torch.tensor([1]), plain.rows(slice(1, 2)), n_rows=4)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_layer_that_falls_back_to_plain_scales_is_saved_and_loaded(symmetric, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=512, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    pql.quantize_model(model, pql.HQQConfig(nbits=4, double_quant=True, symmetric=symmetric), progress=False)
    layer = model.model.layers[0].self_attn.q_proj
    before, weight = layer.quantized_weight, layer.dequantize()
    weight[3] = row_for_float_scales(512)
    layer.weight = weight
    assert not layer.spec.double_quant
    assert set(layer.state_dict()) == set(layer.spec.tensor_layout(512, 512))
    pql.save_model(model, tmp_path)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
    layer.quantized_weight = before  # and the way back, as unmerge goes it
    assert set(layer.state_dict()) == set(layer.spec.tensor_layout(512, 512))
    assert layer.spec.double_quant


def test_layers_that_share_tensors_take_those_of_the_new_layout():
    torch.manual_seed(0)
    spec = HQQSpec(nbits=4, group_size=64, double_quant=True)
    table = QuantizedEmbedding.from_embedding(nn.Embedding(64, 512), spec)
    head = QuantizedLinear.from_weight(table.dequantize(), None, spec)
    table.share_tensors([head])
    table.weight[3] = row_for_float_scales(512)
    for layer in (head, table):
        assert {name for name, _ in layer.named_parameters()} == set(layer.spec.tensor_layout(64, 512))
    x = torch.randn(2, 512)
    torch.testing.assert_close(head(x), x @ table.dequantize().T, rtol=1e-3, atol=1e-3)
