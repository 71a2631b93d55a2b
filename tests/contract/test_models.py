"""What every registered method gets without a line of its own: models, LoRA, every way to merge, saving, copies."""

import copy
import multiprocessing
import pickle

import pytest
import torch
import torch.nn.functional as F
from every_method import quick_config
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.lora import LoraQuantizedLinear
from peft_quantlayers.model_merge.merge_back import STRATEGIES

IDS = torch.randint(3, 96, (8, 40), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DATA = pql.Calibration(data=IDS, n_tokens=320, sequence_length=40)


def float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()


def quantized_model(method: pql.QuantMethod, **options) -> nn.Module:
    return pql.quantize_model(float_model(), quick_config(method.spec_type.method), progress=False, **options)


def with_lora(model: nn.Module, *, is_trained: bool = True, **fields) -> PeftModel:
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": True} | fields
    adapted = get_peft_model(model, LoraConfig(**config))
    for name, parameter in adapted.named_parameters():
        if is_trained and "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    return adapted.eval()


def bits_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS[:2]).logits


def test_a_model_is_the_same_quantized_in_memory_while_loading_and_loaded_again(method, tmp_path):
    model = quantized_model(method)
    float_model().save_pretrained(tmp_path / "float")
    config = quick_config(method.spec_type.method)
    on_the_fly = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config).eval()
    pql.save_model(model, tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for other in (on_the_fly, loaded):
        assert_same_bits(other.state_dict(), model.state_dict())
        assert torch.equal(logits(other), logits(model))
    layouts = [
        {name: layer.spec.tensor_layout(*layer.weight.shape) for name, layer in pql.quantized_modules(each).items()}
        for each in (model, on_the_fly, loaded)
    ]
    assert layouts[0] == layouts[1] == layouts[2]


def test_calibration_lowers_the_output_errors_or_is_refused(method):
    if not method.can_use_hessian(quick_config(method.spec_type.method).spec_for("layer")):
        with pytest.raises(ValueError, match=r"calibration.*not changed"):
            quantized_model(method, calibration=DATA)
        return
    results: list[pql.LayerResult] = []
    quantized_model(method, calibration=DATA, on_layer=results.append)
    assert len(results) == 14
    assert all(result.output_error < result.weight_error for result in results)


def test_lora_computes_and_trains_as_on_a_dense_layer_of_the_same_weight(method):
    model = with_lora(quantized_model(method))
    dense = copy.deepcopy(model)
    for layer in [module for module in dense.modules() if isinstance(module, LoraQuantizedLinear)]:
        base = layer.get_base_layer()
        linear = nn.Linear(base.in_features, base.out_features, bias=base.bias is not None)
        linear.weight.data = base.dequantize(torch.float32)
        if base.bias is not None:
            linear.bias.data = base.bias.data
        layer.base_layer = linear.requires_grad_(False)
    losses = []
    for each in (model, dense):
        loss = each(IDS, labels=IDS).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    expected = {name: p.grad for name, p in dense.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-6)


def test_training_lowers_the_loss(method):
    model = with_lora(quantized_model(method), is_trained=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def refusal_of(method: pql.QuantMethod, strategy: str) -> str | None:
    """What is said where plain LoRA on this method's weights cannot be merged by ``strategy``; None where it can."""
    spec = quick_config(method.spec_type.method).spec_for("layer")
    if strategy == "append":
        try:
            spec.extended()
        except NotImplementedError:
            return "cannot be extended"
    if strategy == "calibrated" and not method.can_use_hessian(spec):
        return "not possible"
    return {"exact": "cannot be merged exactly", "aware": "not trained merge-aware"}.get(strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_merges_and_is_taken_back_to_the_bit_or_is_refused(method, strategy):
    model = with_lora(quantized_model(method))
    before, expected, refusal = bits_of(model), logits(model), refusal_of(method, strategy)
    options = {"calibration": DATA, "progress": False} if strategy == "calibrated" else {}
    if refusal is not None:
        with pytest.raises((ValueError, NotImplementedError), match=rf"layers\.0.*{refusal}"):
            pql.merge_back(model, strategy=strategy, unload=False, **options)
        assert_same_bits(bits_of(model), before)
        return
    merged, report = pql.merge_back(model, strategy=strategy, unload=False, **options)
    assert {layer.strategy for layer in report.layers} == {"requantize" if strategy == "auto" else strategy}
    assert len(report.layers) == 14
    if strategy in ("keep", "dense"):
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    elif strategy == "calibrated":
        assert report.output_retained == pytest.approx(1.0, abs=0.15)
    else:
        assert report.delta_retained == pytest.approx(1.0, abs=0.3)
    model.unmerge_adapter()
    assert_same_bits(bits_of(model), before)
    assert torch.equal(logits(model), expected)


def test_merge_aware_training_computes_what_the_merge_gives(method):
    model = with_lora(quantized_model(method), is_trained=False)
    pql.enable_merge_aware(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval())
    merged, report = pql.merge_back(model)
    assert {layer.strategy for layer in report.layers} == {"aware"}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_qalora_merges_exactly_or_is_refused(method):
    config = quick_config(method.spec_type.method)
    spec = config.spec_for("layer")
    try:
        group_size = method.group_delta_size(spec, in_features=SIZES["hidden_size"])
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=r"use_qalora needs.*use_qalora=False"):
            with_lora(quantized_model(method), use_qalora=True, qalora_group_size=16)
        return
    model = with_lora(quantized_model(method), use_qalora=True, qalora_group_size=group_size)
    expected = logits(model)
    merged, report = pql.merge_back(model)
    assert {layer.strategy for layer in report.layers} == {"exact"}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)


def test_a_merged_model_is_saved_and_loaded(method, tmp_path):
    merged, _ = pql.merge_back(with_lora(quantized_model(method)), strategy="keep")
    pql.save_model(merged, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(merged))


def test_loftq_brings_the_model_nearer_to_the_float_one(method):
    model = with_lora(quantized_model(method), is_trained=False)
    results = pql.initialize_loftq(model, float_model(), progress=False)
    assert len(results) == 14
    assert all(result.error_after < result.error_before for result in results)


def test_copies_and_pickles_compute_the_same_bits(method):
    model = quantized_model(method)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert_same_bits(other.state_dict(), model.state_dict())


def _product_of(pickled: bytes, x: Tensor) -> Tensor:
    return pickle.loads(pickled)(x)


def test_layers_of_methods_in_the_package_pickle_into_a_new_process(method):
    if method.spec_type.method.startswith("toy"):
        return  # registered in this process only
    layer = pql.QuantizedLinear.from_linear(nn.Linear(64, 16), quick_config(method.spec_type.method).spec_for("0"))
    x = torch.randn(2, 64)
    with multiprocessing.get_context("spawn").Pool(1) as pool, torch.no_grad():
        found = pool.apply(_product_of, (pickle.dumps(layer.requires_grad_(False)), x))
    torch.testing.assert_close(found, layer(x).detach())


def test_a_layer_compiles_whole(method, fresh_compiler):
    spec = quick_config(method.spec_type.method).spec_for("0")
    layer = pql.QuantizedLinear.from_linear(nn.Linear(64, 16), spec)
    x = torch.randn(2, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, F.linear(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-5)


def test_writes_by_any_name_requantize(method):
    spec = quick_config(method.spec_type.method).spec_for("0")
    written = 0.05 * torch.randn(16, 64)
    expected = method.quantize(written, spec)

    def assign(layer: nn.Module) -> None:
        layer.weight = written

    def set_data(layer: nn.Module) -> None:
        layer.weight.data = written

    def copy_in_place(layer: nn.Module) -> None:
        layer.weight.data.copy_(written)

    for write in (assign, set_data, copy_in_place):
        layer = pql.QuantizedLinear.from_linear(nn.Linear(64, 16), spec)
        write(layer)
        assert all(torch.equal(layer.get_parameter(name), tensor) for name, tensor in expected.tensors.items())


def test_adapters_of_pefts_other_tuners_merge(method):
    """LoHa stands for the tuners of which nothing is known but the weight that they give."""
    torch.manual_seed(1)
    model = get_peft_model(quantized_model(method), LoHaConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "hada_" in name:
            parameter.data.normal_(0, 0.15)
    merged, report = pql.merge_back(model)
    assert {layer.strategy for layer in report.layers} == {"requantize"}
    assert len(report.layers) == 4
    assert report.delta_retained == pytest.approx(1.0, abs=0.4)
    assert not any("hada_" in name for name, _ in merged.named_parameters())
