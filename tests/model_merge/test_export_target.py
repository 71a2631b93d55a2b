"""Weights for another engine's format stay on its grid, whatever is trained on them and merged into them."""

import pytest
import torch
from contract.test_models import DATA, IDS, assert_same_bits, bits_of, float_model, logits, with_lora
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, QuantScalesConfig
from peft_quantlayers.methods.hqq.export_grids import why_not

CONFIGS = {
    "gguf": HQQConfig.for_export("gguf", group_size=32),
    "gguf-8": HQQConfig.for_export("gguf", nbits=8),
    "mlx-3": HQQConfig.for_export("mlx", nbits=3, group_size=32),
    "awq": HQQConfig.for_export("awq", group_size=16),
    "vllm-8": HQQConfig.for_export("vllm", nbits=8, group_size=32),
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def on_target(config: HQQConfig, **options) -> nn.Module:
    return pql.quantize_model(float_model(), config, progress=False, **options)


def grids_of(model: nn.Module) -> dict[str, pql.QuantSpec]:
    return {layer.layer_name: layer.spec for layer in model.modules() if isinstance(layer, pql.QuantizedLinear)}


def assert_on_target(model: nn.Module, config: HQQConfig) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, pql.QuantizedLinear)]
    assert layers
    for layer in layers:
        assert layer.spec.export_target == config.export_target
        assert layer.spec.zeros == config.zeros
        assert why_not(config.export_target, layer.spec, layer.in_features) == []
        tensors = layer.quantized_weight.tensors
        assert tensors["scale"].dtype == getattr(torch, layer.spec.scale_dtype)
        assert ("zero" in tensors) == (config.zeros != "symmetric")
        if config.zeros == "integer":
            zero = tensors["zero"].float()
            assert torch.equal(zero, zero.round().clamp(0, 2**layer.spec.nbits - 1))


def train(model: nn.Module, learning_rate: float = 1e-2, steps: int = 6) -> tuple[float, float]:
    """The loss before and after a few steps."""
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        return losses[0], model(IDS, labels=IDS).loss.item()


@each_config
@pytest.mark.parametrize("strategy", ["requantize", "calibrated", "aware"])
def test_every_merge_stays_on_the_grid(config, strategy, tmp_path):
    model = with_lora(on_target(config), is_trained=strategy != "aware")
    options = {"calibration": DATA, "progress": False} if strategy == "calibrated" else {}
    if strategy == "aware":
        pql.enable_merge_aware(model)
        first, last = train(model)
        assert last < first - 0.02
    expected = logits(model)
    merged, report = pql.merge_back(model, strategy=strategy, **options)
    assert_on_target(merged, config)
    assert report.delta_retained > 0.5
    assert all(layer.bits_after == layer.bits_before for layer in report.layers)
    if strategy == "aware":
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    pql.save_model(merged, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_on_target(loaded, config)
    assert torch.equal(logits(loaded), logits(merged))


@each_config
def test_calibrated_and_on_the_fly_weights_are_on_the_grid(config, tmp_path):
    assert_on_target(on_target(config, calibration=DATA), config)
    float_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config).eval()
    assert_on_target(loaded, config)
    assert_same_bits(bits_of(loaded), bits_of(on_target(config)))


@each_config
def test_tuned_scales_are_trained_as_the_target_stores_them(config):
    base = on_target(config)
    before = grids_of(base)
    train_roles = ("scales", "zeros") if config.zeros == "float" else ("scales",)
    model = get_peft_model(base, QuantScalesConfig(train=train_roles))
    first, last = train(model, learning_rate=1e-3)
    assert last < first
    expected = logits(model)
    merged = pql.merge_back(model).model
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert_on_target(merged, config)
    widens = config.export_target not in ("gguf", "awq")  # the others hold float32
    assert ("float32" in {spec.scale_dtype for spec in grids_of(merged).values()}) == widens
    assert any(spec != before[name] for name, spec in grids_of(merged).items()) == widens


def qalora(config: HQQConfig, size: float) -> nn.Module:
    model = get_peft_model(
        on_target(config),
        LoraConfig(r=4, target_modules=["q_proj", "gate_proj"], use_qalora=True, qalora_group_size=32),
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["gguf", "mlx-3"])
def test_qalora_merges_into_the_zeros_that_the_target_stores(name):
    config = CONFIGS[name]
    model = qalora(config, 0.01)
    expected = logits(model)
    base_logits = logits(on_target(config))
    merged, report = pql.merge_back(model, strategy="exact")
    assert_on_target(merged, config)
    assert report.delta_retained == pytest.approx(1.0, abs=0.02)
    moved = (expected - base_logits).norm()
    assert (logits(merged) - expected).norm() < 0.15 * moved


def test_a_target_that_holds_float32_gets_the_smallest_deltas_too():
    model = qalora(CONFIGS["mlx-3"], 1e-4)
    expected = logits(model)
    merged, report = pql.merge_back(model, strategy="exact")
    assert_on_target(merged, CONFIGS["mlx-3"])
    assert {spec.scale_dtype for layer, spec in grids_of(merged).items() if "q_proj" in layer} == {"float32"}
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-6)
    assert report.delta_retained == pytest.approx(1.0, abs=1e-3)


def test_a_delta_that_the_zeros_of_the_target_would_lose_is_refused_and_nothing_changes():
    model = qalora(CONFIGS["gguf"], 1e-4)
    before = bits_of(model)
    with pytest.raises(ValueError, match=r"q_proj.*float16.*'gguf'.*requantize"):
        pql.merge_back(model, strategy="exact")
    assert_same_bits(bits_of(model), before)


@pytest.mark.parametrize("name", ["awq", "gguf-8"])
def test_qalora_needs_float_zeros_and_says_for_which_targets(name):
    with pytest.raises(
        NotImplementedError, match=rf"q_proj.*unlike '{CONFIGS[name].export_target}'.*use_qalora=False"
    ):
        qalora(CONFIGS[name], 0.01)


@each_config
def test_loftq_and_writes_stay_on_the_grid(config):
    model = with_lora(on_target(config), is_trained=False)
    pql.initialize_loftq(model, float_model(), progress=False)
    assert_on_target(model, config)
    plain = on_target(config)
    layer = plain.get_submodule("model.layers.0.mlp.up_proj")
    layer.weight.data.mul_(1.1)
    assert_on_target(plain, config)
