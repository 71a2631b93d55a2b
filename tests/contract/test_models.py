"""What every registered method gets without a line of its own: models, LoRA, every way to merge, saving, copies."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from every_method import VARIANTS
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from programs import run_program
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.lora import LoraQuantizedLinear
from peft_quantlayers.merging.strategies import STRATEGIES

IDS = torch.randint(3, 96, (8, 40), generator=torch.Generator().manual_seed(0))
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DATA = pql.Calibration(data=IDS, n_tokens=320, sequence_length=40)


def float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()


@functools.cache
def _quantized(config: pql.QuantConfig) -> nn.Module:
    return pql.quantize_model(float_model(), config, progress=False)


def quantized_model(config: pql.QuantConfig) -> nn.Module:
    """A copy: one quantization does for all tests of a config."""
    return copy.deepcopy(_quantized(config))


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


def test_a_model_is_the_same_quantized_in_memory_while_loading_and_loaded_again(config, tmp_path):
    model = quantized_model(config)
    float_model().save_pretrained(tmp_path / "float")
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


def test_calibration_lowers_the_output_errors_or_is_refused(config, method, spec):
    if not method.can_use_hessian(spec):
        with pytest.raises(ValueError, match=r"calibration.*not changed"):
            pql.quantize_model(float_model(), config, calibration=DATA, progress=False)
        return
    results: list[pql.LayerResult] = []
    pql.quantize_model(float_model(), config, calibration=DATA, progress=False, on_layer=results.append)
    assert len(results) == 14
    assert all(result.output_error < result.weight_error for result in results)


def test_lora_computes_and_trains_as_on_a_dense_layer_of_the_same_weight(config):
    model = with_lora(quantized_model(config))
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


def test_training_lowers_the_loss(config):
    model = with_lora(quantized_model(config), is_trained=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


def refusal_of(method: pql.QuantMethod, spec: pql.QuantSpec, strategy: str) -> str | None:
    """What is said where plain LoRA on weights of ``spec`` cannot be merged by ``strategy``; None where it can."""
    if strategy == "append":
        try:
            spec.extended()
        except NotImplementedError:
            return "cannot be extended"
    if strategy == "calibrated" and not method.can_use_hessian(spec):
        return "not possible"
    return {"exact": "cannot be merged exactly", "aware": "not trained merge-aware"}.get(strategy)


WITH_DATA = {"calibration": DATA, "progress": False}
# Each strategy, and those that take calibration data or none both ways.
WAYS = [(name, WITH_DATA if name == "calibrated" else {}) for name in STRATEGIES] + [("append", WITH_DATA)]


@pytest.mark.parametrize(("strategy", "options"), WAYS, ids=[f"{name}{'-data' * bool(data)}" for name, data in WAYS])
def test_every_strategy_merges_and_is_undone_to_the_bit_or_is_refused(config, method, spec, strategy, options):
    model = with_lora(quantized_model(config))
    before, expected, refusal = bits_of(model), logits(model), refusal_of(method, spec, strategy)
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
    elif options:
        assert report.output_retained == pytest.approx(1.0, abs=0.15)
    else:
        assert report.delta_retained == pytest.approx(1.0, abs=0.3)
    model.unmerge_adapter()
    assert_same_bits(bits_of(model), before)
    assert torch.equal(logits(model), expected)


def assert_merged_and_undone(model: PeftModel, *, strategy: str, tolerance: float) -> None:
    """The automatic merge is by ``strategy`` and moves no logit by more; undone, the bits are those of before."""
    before, expected = bits_of(model), logits(model)
    merged, report = pql.merge_back(model, unload=False)
    assert {layer.strategy for layer in report.layers} == {strategy}
    assert len(report.layers) == 14
    torch.testing.assert_close(logits(merged), expected, rtol=tolerance, atol=tolerance)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in bits_of(model).items() if name in before)
    model.unmerge_adapter()
    assert_same_bits(bits_of(model), before)
    assert torch.equal(logits(model), expected)


def test_merge_aware_training_computes_what_the_merge_gives(config):
    model = with_lora(quantized_model(config), is_trained=False)
    pql.enable_merge_aware(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_merged_and_undone(model.eval(), strategy="aware", tolerance=1e-5)


def test_qalora_merges_exactly_or_is_refused(config, method, spec):
    try:
        group_size = method.group_delta_size(spec, in_features=SIZES["hidden_size"])
    except NotImplementedError:
        with pytest.raises(NotImplementedError, match=r"use_qalora needs.*use_qalora=False"):
            with_lora(quantized_model(config), use_qalora=True, qalora_group_size=16)
        return
    model = with_lora(quantized_model(config), use_qalora=True, qalora_group_size=group_size)
    assert_merged_and_undone(model, strategy="exact", tolerance=1e-3)


def test_a_merged_model_is_saved_and_loaded(config, tmp_path):
    merged, _ = pql.merge_back(with_lora(quantized_model(config)), strategy="keep")
    pql.save_model(merged, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits(loaded), logits(merged))


def test_loftq_brings_the_model_nearer_to_the_float_one(config):
    model = with_lora(quantized_model(config), is_trained=False)
    results = pql.initialize_loftq(model, float_model(), progress=False)
    assert len(results) == 14
    assert all(result.error_after < result.error_before for result in results)


def test_copies_and_pickles_compute_the_same_bits(config):
    model = quantized_model(config)
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        assert_same_bits(other.state_dict(), model.state_dict())


# Imports nothing of ours before the first pickle does.
PRODUCTS = """
import pickle, sys, torch
assert "peft_quantlayers" not in sys.modules
with open(sys.argv[1], "rb") as file:
    x, pickled = pickle.load(file)
with torch.no_grad():
    torch.save([pickle.loads(layer)(x) for layer in pickled], sys.argv[2])
"""


def test_layers_of_methods_in_the_package_pickle_into_a_new_process(tmp_path):
    """But for the toy, which is registered in this process only."""
    specs = [config.spec_for("layer") for name, config in VARIANTS.items() if not name.startswith("toy")]
    layers = [pql.QuantizedLinear.from_linear(nn.Linear(64, 16), spec).requires_grad_(False) for spec in specs]
    x = torch.randn(2, 64)
    (tmp_path / "layers").write_bytes(pickle.dumps((x, [pickle.dumps(layer) for layer in layers])))
    done = run_program("-c", PRODUCTS, tmp_path / "layers", tmp_path / "products")
    assert done.returncode == 0, done.stderr
    products = torch.load(tmp_path / "products")
    torch.testing.assert_close(products, [layer(x) for layer in layers])
    assert len(products) >= 3


def test_a_layer_compiles_whole(spec, fresh_compiler):
    layer = pql.QuantizedLinear.from_linear(nn.Linear(64, 16), spec)
    x = torch.randn(2, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y, F.linear(x, layer.dequantize(), layer.bias), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-5)


def test_writes_by_any_name_requantize(method, spec):
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


def test_adapters_of_pefts_other_tuners_merge(config):
    """LoHa stands for the tuners of which nothing is known but the weight that they give."""
    torch.manual_seed(1)
    model = get_peft_model(quantized_model(config), LoHaConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    for name, parameter in model.named_parameters():
        if "hada_" in name:
            parameter.data.normal_(0, 0.15)
    merged, report = pql.merge_back(model)
    assert {layer.strategy for layer in report.layers} == {"requantize"}
    assert len(report.layers) == 4
    assert report.delta_retained == pytest.approx(1.0, abs=0.4)
    assert not any("hada_" in name for name, _ in merged.named_parameters())
