"""Merge-aware training: one function before and after the merge, its gradient, its memory, and its stamp."""

import copy
import json
import warnings

import pytest
import torch
from every_method import METHODS, quick_config
from integrations.tiny import tiny_model, training_arguments
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, LoraQuantizedLinear
from peft_quantlayers.evaluate import saved_for_backward

from .test_layer import Two, assert_same_bits, bits_of, with_adapter

CONFIGS = {
    "hqq4": HQQConfig(nbits=4, group_size=32),
    "hqq2": HQQConfig(nbits=2, group_size=16),
    "hqq3-axis0": HQQConfig(nbits=3, group_size=32, axis=0),
    "hqq8-integer": HQQConfig(nbits=8, group_size=32, integer_zero=True),
} | {name: quick_config(name) for name in METHODS}
every_method = pytest.mark.parametrize("config", [quick_config(name) for name in METHODS], ids=METHODS)
pytestmark = pytest.mark.usefixtures("toy_method")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def aware_model(config: pql.QuantConfig = CONFIGS["hqq4"], **fields) -> PeftModel:
    """Trained-looking adapters, a twentieth of the weights' size, switched to merge-aware."""
    torch.manual_seed(0)
    model = with_adapter(pql.quantize_model(Two(), config, progress=False), **fields)
    for layer in lora_layers(model):
        layer.lora_B["default"].weight.data *= 0.05
    pql.enable_merge_aware(model)
    return model


def lora_layers(model: nn.Module) -> list[LoraQuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, LoraQuantizedLinear)]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("strategy", ["aware", "auto"])
def test_the_merged_model_computes_what_was_trained(config, strategy, x):
    model = aware_model(config)
    with model.disable_adapter():
        base = model(x)
    trained = model.train()(x)
    assert torch.equal(model.eval()(x), trained)
    assert (trained - base).norm() > 0.01 * base.norm()
    merged, report = pql.merge_back(model, strategy=strategy)
    torch.testing.assert_close(merged(x), trained, rtol=1e-4, atol=1e-5)  # few tokens may take another kernel
    assert report.layers[0].bits_after == report.layers[0].bits_before


def test_the_delta_is_retained_on_average_and_no_delta_moves_no_code(x):
    model = aware_model()
    layer = lora_layers(model)[0]
    base, delta = layer.get_base_layer(), layer.get_delta_weight("default").detach()
    before = base.dequantize(torch.float32)
    layer.merge()
    assert layer.merge_report.delta_retained == pytest.approx(1.0, abs=0.15)
    moved = base.dequantize(torch.float32) - before
    assert moved.mean() == pytest.approx(delta.mean().item(), abs=0.1 * delta.abs().mean().item())
    layer.unmerge()
    bits = bits_of(layer)
    layer.lora_B["default"].weight.data.zero_()
    layer.merge()
    assert_same_bits(layer, bits)


@every_method
def test_gradients_are_those_of_the_dense_straight_through_estimator(config, x):
    model = aware_model(config, target_modules=["first"])
    layer = lora_layers(model)[0]
    x = x.requires_grad_()
    grad_y = torch.randn(5, 96)
    layer(x).backward(grad_y)
    lora_A, lora_B, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    grads = (x.grad, lora_A.grad, lora_B.grad)

    layer.merge()
    rounded = layer.get_base_layer().dequantize(torch.float32)
    grad_weight = grad_y.t() @ x.detach()
    expected = (grad_y @ rounded, scaling * lora_B.t() @ grad_weight, scaling * grad_weight @ lora_A.t())
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, reference.detach(), rtol=1e-4, atol=1e-5)


def test_as_little_is_kept_for_the_backward_pass_as_for_plain_lora():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512))
    model = with_adapter(pql.quantize_model(dense, HQQConfig(nbits=4), progress=False), target_modules=["0", "1"])
    x = torch.randn(64, 512)
    plain = saved_for_backward(model, x)
    pql.enable_merge_aware(model)
    assert saved_for_backward(model, x) < 1.2 * plain < 512 * 512 * 4


@every_method
def test_gradient_checkpointing_changes_no_gradient(config, x):
    grads = []
    for use_reentrant in (None, False, True):
        model = aware_model(config)
        x = x.detach().requires_grad_()
        y = model(x) if use_reentrant is None else checkpoint(model, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


@every_method
def test_autocast_and_a_bfloat16_base_compute_what_the_merged_model_does(config, x):
    model = aware_model(config)
    half = aware_model(config).to(torch.bfloat16)
    for module in half.modules():
        if isinstance(module, LoraQuantizedLinear):
            module.lora_A.float()
            module.lora_B.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(x)
    trained_half = half(x.bfloat16())
    assert trained.dtype == trained_half.dtype == torch.bfloat16
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    merged, merged_half = (pql.merge_back(each, strategy="aware")[0] for each in (model, half))
    # Few tokens may take another kernel, which rounds less on the way.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(merged(x), trained, rtol=0.02, atol=0.01)
    torch.testing.assert_close(merged_half(x.bfloat16()), trained_half, rtol=0.02, atol=0.01)


def test_several_adapters_are_summed_before_they_are_rounded(x):
    model = aware_model()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False, use_rslora=True))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"other.*enable_merge_aware"):
        model(x)
    pql.enable_merge_aware(model, ["other"])
    trained = model(x)
    merged, report = pql.merge_back(model, strategy="aware")
    assert report.layers[0].adapters == ("default", "other")
    torch.testing.assert_close(merged(x), trained, rtol=1e-4, atol=1e-5)


@every_method
def test_training_lowers_the_loss_of_the_merged_model(config, x):
    model = aware_model(config)
    target = torch.randn(5, 64)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(60):
        loss = (model(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    merged, _ = pql.merge_back(model, strategy="aware")
    assert (merged(x) - target).square().mean() < 0.3 * losses[0]


def test_the_stamp_travels_with_the_adapter_and_turns_the_rounding_on_again(x, tmp_path):
    model = aware_model()
    trained = model(x)
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert set(fields["merge_aware"]["layers"]) == {"first", "second"}

    def base(config: pql.QuantConfig) -> nn.Module:
        torch.manual_seed(0)
        return pql.quantize_model(Two(), config, progress=False)

    loaded = PeftModel.from_pretrained(base(CONFIGS["hqq4"]), tmp_path)
    assert torch.equal(loaded(x), trained)
    merged = pql.merge_back(loaded, strategy="aware")[0]
    torch.testing.assert_close(merged(x), trained, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"first.*another quantized weight.*nbits=2.*requantize"):
        PeftModel.from_pretrained(base(CONFIGS["hqq2"]), tmp_path)

    fields["merge_aware"]["rounding"] = 999
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="999"):
        PeftModel.from_pretrained(base(CONFIGS["hqq4"]), tmp_path)


@pytest.mark.parametrize("road", ["load", "load beside another"])
def test_on_a_base_that_is_not_quantized_it_is_refused_before_the_base_is_changed(road, tmp_path):
    aware_model().save_pretrained(tmp_path)
    base = Two()
    if road == "load":
        names = list(base.state_dict())
        with pytest.raises(ValueError, match=r"first.*rounding.*is a Linear.*merge_aware"):
            PeftModel.from_pretrained(base, tmp_path)
        assert list(base.state_dict()) == names
    else:
        model = get_peft_model(base, LoraConfig(target_modules=["first"]))
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=r"first.*rounding.*is a Linear.*merge_aware"):
            model.load_adapter(tmp_path, "other")
        assert list(model.state_dict()) == names
        assert list(model.peft_config) == ["default"]


def test_stock_peft_reads_the_config_with_a_warning_and_an_ordinary_one_without(tmp_path):
    aware_model().save_pretrained(tmp_path / "aware")
    with_adapter(pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False)).save_pretrained(tmp_path / "plain")
    loaded = LoraConfig.from_pretrained(tmp_path / "plain")  # with our class, which must not write its own field
    loaded.save_pretrained(tmp_path / "again")
    pql.unregister()
    try:
        with pytest.warns(UserWarning, match="merge_aware"):
            assert LoraConfig.from_pretrained(tmp_path / "aware").r == 4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert type(LoraConfig.from_pretrained(tmp_path / "again")) is LoraConfig
    finally:
        pql.register()


def test_an_adapter_that_was_not_trained_so_is_refused_and_left_as_it_was(x):
    model = with_adapter(pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False))
    bits, expected = bits_of(model), model(x)
    with pytest.raises(ValueError, match=r"first.*enable_merge_aware.*requantize"):
        pql.merge_back(model, strategy="aware")
    assert_same_bits(model, bits)
    assert torch.equal(model(x), expected)


def test_a_base_that_changed_since_is_refused():
    model = aware_model()
    model.base_model.model.second.get_base_layer().weight.mul_(1.5)
    bits = bits_of(model)
    with pytest.raises(ValueError, match=r"second.*not trained merge-aware on this weight"):
        pql.merge_back(model, strategy="aware")
    assert_same_bits(model, bits)


@pytest.mark.parametrize(
    ("fields", "error", "match"),
    [
        ({"use_dora": True}, NotImplementedError, "plain LoRA"),
        ({"lora_bias": True}, NotImplementedError, "plain LoRA"),
        ({"lora_dropout": 0.1}, ValueError, "lora_dropout=0"),
    ],
)
def test_what_cannot_be_rounded_is_refused_and_nothing_changed(fields, error, match, x):
    model = with_adapter(pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False), **fields).eval()
    expected = model(x)
    with pytest.raises(error, match=f"first.*{match}"):
        pql.enable_merge_aware(model)
    assert torch.equal(model(x), expected)
    assert not any(layer.aware_adapters for layer in lora_layers(model))


def test_merged_adapters_unknown_names_and_models_without_adapter_are_refused():
    model = with_adapter(pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False))
    with pytest.raises(ValueError, match="default"):
        pql.enable_merge_aware(model, ["missing"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="Unmerge"):
        pql.enable_merge_aware(model)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="dequantized"):
        pql.enable_merge_aware(pql.dequantize_model(model))
    with pytest.raises(ValueError, match="get_peft_model"):
        pql.enable_merge_aware(Two())
    with pytest.raises(ValueError, match="no quantized layer"):
        pql.enable_merge_aware(get_peft_model(Two(), LoraConfig(target_modules=["first"])))


def test_codes_that_are_dear_to_choose_are_kept_for_some_steps_of_training_but_never_outside(x, monkeypatch):
    model = aware_model(CONFIGS["aqlm"], target_modules=["first"])
    layer = lora_layers(model)[0]
    method = layer.quantized_base().method
    chosen = []
    merged = type(method).merged

    def counted(*args, **kwargs):
        chosen.append(1)
        return merged(method, *args, **kwargs)

    monkeypatch.setattr(type(method), "merged", lambda self, *args, **kwargs: counted(*args, **kwargs))
    model.train()
    for _ in range(9):
        model(x)
        model(x)  # the same adapters: another part of the batch, or checkpointing
        layer.lora_B["default"].weight.data.mul_(1.1)
    assert len(chosen) == 3  # at the first, the fifth and the ninth
    lagging = model(x)
    evaluated = model.eval()(x)
    assert not torch.equal(lagging, evaluated)
    model(x)
    assert len(chosen) == 4
    layer.merge()
    torch.testing.assert_close(model(x), evaluated, rtol=1e-4, atol=1e-5)


def test_loading_other_codes_into_the_base_is_noticed(x):
    model = aware_model(CONFIGS["aqlm"], target_modules=["first"]).eval()
    model(x)
    state = {name: value.roll(1, 0) if name.endswith("codes") else value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    fresh = aware_model(CONFIGS["aqlm"], target_modules=["first"]).eval()
    fresh.load_state_dict(state)
    assert torch.equal(model(x), fresh(x))


def test_a_mixed_batch_is_refused(x):
    with pytest.raises(NotImplementedError, match="mixed batch"):
        aware_model().eval()(x, adapter_names=["default"] * 5)


def test_a_nan_in_an_aware_adapter_is_refused_by_name():
    model = aware_model()
    lora_layers(model)[1].lora_A["default"].weight.data[0, 0] = float("nan")
    bits = bits_of(model)
    with pytest.raises(ValueError, match="second"):
        pql.merge_back(model, strategy="aware")
    assert_same_bits(model, bits)


@pytest.mark.parametrize("start_step", [0, 3])
def test_the_callback_turns_it_on_at_its_step(start_step, tmp_path):
    base = pql.quantize_model(tiny_model(), HQQConfig(nbits=4, group_size=32), progress=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    states = []

    class Watch(pql.MergeAwareCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(bool(lora_layers(kwargs["model"])[0].aware_adapters))

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, per_device_train_batch_size=2, report_to="none", save_strategy="no",
        gradient_checkpointing=True, use_cpu=True, learning_rate=1e-2,
    )  # fmt: skip
    data = [{"input_ids": (ids := torch.randint(3, 128, (9,))), "labels": ids} for _ in range(10)]
    Trainer(model, arguments, train_dataset=data, callbacks=[Watch(start_step)]).train()
    assert states == [step >= start_step for step in range(5)]
    ids = torch.randint(3, 128, (1, 9))
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=ids).logits
        merged, _ = pql.merge_back(model, strategy="aware")
        torch.testing.assert_close(merged(ids).logits, trained)


@pytest.mark.parametrize(
    ("fields", "start_step", "match"),
    [({"lora_dropout": 0.1}, 3, "lora_dropout"), ({}, 5, "start_step=5"), ({"use_dora": True}, 1, "plain LoRA")],
)
def test_what_would_fail_at_the_callbacks_step_fails_before_the_first(fields, start_step, match, tmp_path):
    base = pql.quantize_model(tiny_model(), CONFIGS["hqq4"], progress=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], **fields))
    data = [{"input_ids": (ids := torch.randint(3, 128, (9,))), "labels": ids} for _ in range(10)]
    arguments = training_arguments(tmp_path, steps=5, bf16=False)
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[pql.MergeAwareCallback(start_step)])
    with pytest.raises((ValueError, NotImplementedError), match=match):
        trainer.train()
    assert trainer.state.global_step == 0
    assert not lora_layers(model)[0].aware_adapters


def test_the_callback_refuses_a_negative_step():
    with pytest.raises(ValueError, match="start_step"):
        pql.MergeAwareCallback(-1)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_took_weight_from_the_base_loads_on_the_base_as_it_was(init, x, tmp_path):
    torch.manual_seed(0)
    base = pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False)
    other = pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False)
    model = with_adapter(copy.deepcopy(base), init_lora_weights=init)
    pql.enable_merge_aware(model)
    model.base_model.model.first.lora_B["default"].weight.data *= 1.1
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), model.eval()(x))
    assert pql.merge_back(loaded, strategy="aware")[1].strategy == "aware"
    with pytest.raises(ValueError, match="another quantized weight"):
        PeftModel.from_pretrained(other, tmp_path)


def test_a_bare_name_is_told_to_be_a_list():
    with pytest.raises(TypeError, match=r"write \['default'\]"):
        pql.enable_merge_aware(with_adapter(pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False)), "default")


def test_an_adapter_that_was_trained_before_is_named(caplog):
    for init, is_new in ((True, True), (False, False)):
        caplog.clear()
        base = pql.quantize_model(Two(), CONFIGS["hqq4"], progress=False)
        pql.enable_merge_aware(get_peft_model(base, LoraConfig(target_modules=["first"], init_lora_weights=init)))
        assert ("are already trained" in caplog.text) == (not is_new)
