"""Calibrated merging: the adapter's outputs survive where rounding loses them, and everything can be taken back."""

import copy

import pytest
import torch
from every_method import methods_for, quick_config
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import Calibration, HQQConfig, quantize_model, quantized_modules
from peft_quantlayers.merging import MergePlan, MergeResult
from peft_quantlayers.merging.calibrated_rule import for_outputs
from peft_quantlayers.merging.coefficients import output_error, retained_fraction

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
HELD_OUT = torch.randint(3, 128, (8, 40), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "hqq4": HQQConfig(nbits=4, group_size=16),
    "hqq2": HQQConfig(nbits=2, group_size=16),
} | {name: quick_config(name) for name in methods_for("calibrated") if name != "hqq"}
pytestmark = pytest.mark.usefixtures("toy_method")


def calibration(**fields) -> Calibration:
    return Calibration(data=IDS, **({"n_tokens": 640, "sequence_length": 40, "damping": 0.05} | fields))


def adapted(config: pql.QuantConfig, scale: float = 0.02, **lora) -> nn.Module:
    """A quantized model with an adapter whose delta is far below a step."""
    base = quantize_model(tiny_model(), config, progress=False)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 4, "target_modules": "all-linear"} | lora)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, scale)
    return model.eval()


def bits_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{layer.layer_name}.{name}": tensor.clone()
        for layer in quantized_modules(model).values()
        for name, tensor in layer.quantized_weight.tensors.items()
    }


def layer_with_inputs(model: nn.Module) -> tuple[str, pql.LoraQuantizedLinear, torch.Tensor]:
    """The first layer with an adapter: its name, itself, and the second moment of some inputs of it."""
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, pql.LoraQuantizedLinear))
    inputs = torch.randn(256, layer.in_features, generator=torch.Generator().manual_seed(5))
    return name, layer, inputs.t() @ inputs / len(inputs)


def distance(model: nn.Module, expected: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(HELD_OUT).logits - expected).square().sum())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_more_of_the_adapter_survives_than_without_data(config):
    model = adapted(config)
    with torch.no_grad():
        expected = model(HELD_OUT).logits
    rounded, _ = pql.merge_back(copy.deepcopy(model), strategy="requantize")
    merged, report = pql.merge_back(copy.deepcopy(model), strategy="calibrated", calibration=calibration())
    assert distance(merged, expected) < 0.9 * distance(rounded, expected)
    assert "output retained" in str(report)
    assert report.to_dict()["output_retained"] == report.output_retained
    assert report.to_dict()["output_noise"] == report.output_noise > 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_whole_delta_of_the_outputs_is_retained_where_the_least_error_retains_a_fraction(config):
    """A part that is lacking in every layer adds up; noise does not."""
    model = adapted(config)
    _, layer, hessian = layer_with_inputs(model)
    kept = {}

    def least_error(plan: MergePlan) -> MergeResult:
        method, spec = plan.method, plan.weight.spec
        merged = method.quantize(plan.target, spec, hessian=hessian, start=plan.weight)
        kept["least error"] = retained_fraction(plan.before, plan.target, method.dequantize(merged), hessian)
        return MergeResult(strategy="least error", weight=merged)

    def whole(plan: MergePlan) -> MergeResult:
        merged = for_outputs(plan, plan.weight.spec, hessian)
        kept["whole"] = retained_fraction(plan.before, plan.target, plan.method.dequantize(merged), hessian)
        return MergeResult(strategy="whole", weight=merged)

    for rule in (least_error, whole):
        layer.merge_by(rule, ["default"])
        layer.unmerge()
    assert kept["least error"] < 0.97
    assert abs(kept["whole"] - 1) < 0.5 * (1 - kept["least error"])


def test_a_large_change_errs_no_more_than_on_a_grid_of_its_own():
    model = adapted(CONFIGS["hqq4"], scale=30.0)
    _, layer, hessian = layer_with_inputs(model)
    errors = {}

    def compare(plan: MergePlan) -> MergeResult:
        method, spec = plan.method, plan.weight.spec
        assert (plan.target - plan.before).norm() > plan.before.norm()
        merged = for_outputs(plan, spec, hessian)
        from_scratch = method.quantize(plan.target, spec, hessian=hessian)
        for what, weight in {"merged": merged, "from scratch": from_scratch}.items():
            errors[what] = output_error(method.dequantize(weight) - plan.target, hessian)
        return MergeResult(strategy="compare", weight=merged)

    layer.merge_by(compare, ["default"])
    assert errors["merged"] <= errors["from scratch"]


def test_fewer_tokens_than_a_layer_has_inputs_are_said_by_number(caplog):
    base = quantize_model(nn.Sequential(nn.Linear(64, 64)), CONFIGS["hqq4"], progress=False)
    model = get_peft_model(base, LoraConfig(target_modules=["0"], init_lora_weights=False))
    for n_rows, is_few in ((63, True), (64, False)):
        caplog.clear()
        data = [torch.randn(n_rows, 64)]
        pql.merge_back(copy.deepcopy(model), strategy="calibrated", calibration=data, progress=False)
        assert (f"(0: 64) than the {n_rows} tokens" in caplog.text) == is_few


def test_finetuning_the_blocks_brings_the_outputs_nearer_and_leaves_the_norms():
    model = adapted(CONFIGS["hqq2"])
    norms = {name: p.clone() for name, p in model.named_parameters() if "norm" in name}
    with torch.no_grad():
        expected = model(HELD_OUT).logits
    plain, _ = pql.merge_back(copy.deepcopy(model), strategy="calibrated", calibration=calibration())
    given = calibration(finetune_epochs=6, learning_rate=0.003)
    tuned, _ = pql.merge_back(copy.deepcopy(model), strategy="calibrated", calibration=given)
    assert distance(tuned, expected) < distance(plain, expected)
    after = {f"base_model.model.{name}": p for name, p in tuned.named_parameters() if "norm" in name}
    assert all(torch.equal(after[name], norm) for name, norm in norms.items())


def test_the_report_is_on_the_finetuned_weights():
    model = adapted(CONFIGS["hqq2"])
    dense, _ = pql.merge_back(copy.deepcopy(model), strategy="dense")
    given = calibration(finetune_epochs=4, learning_rate=0.01)
    plain, _ = pql.merge_back(copy.deepcopy(model), strategy="calibrated", calibration=calibration())
    merged, report = pql.merge_back(model, strategy="calibrated", calibration=given)
    was_tuned = []
    for layer in report.layers:
        found = merged.get_submodule(layer.name).dequantize(torch.float32)
        was_tuned.append(not torch.equal(found, plain.get_submodule(layer.name).dequantize(torch.float32)))
        error = found - dense.get_submodule(layer.name).weight
        assert layer.error_norm == pytest.approx(error.norm().item(), rel=1e-4)
    assert all(was_tuned)
    assert all(layer.output_retained is not None for layer in report.layers)


def test_a_zero_adapter_changes_no_bit():
    model = adapted(CONFIGS["hqq4"], scale=0.0)
    before = bits_of(model)
    merged, report = pql.merge_back(model, strategy="calibrated", calibration=calibration())
    after = bits_of(merged)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert report.output_retained == 1.0


def test_only_the_named_adapters_are_merged():
    model = adapted(CONFIGS["hqq4"])
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            parameter.data.normal_(0, 1)
    alone = adapted(CONFIGS["hqq4"])
    merged, _ = pql.merge_back(model, strategy="calibrated", calibration=calibration(), adapters=["default"])
    expected, _ = pql.merge_back(alone, strategy="calibrated", calibration=calibration())
    found = bits_of(merged)
    assert all(torch.equal(found[name], tensor) for name, tensor in bits_of(expected).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "calibrated"}, "needs calibration="),
        ({"strategy": "requantize", "calibration": IDS}, "takes no calibration data"),
        ({"strategy": "calibrated", "calibration": IDS.flatten()[:50]}, "50 tokens"),
        ({"strategy": "calibrated", "calibration": []}, "empty"),
        ({"strategy": "calibrated", "calibration": calibration(resume_folder="finished")}, "resume_folder"),
    ],
    ids=["none", "other strategy", "few", "empty", "resume_folder"],
)
def test_a_refused_call_leaves_the_model_as_it_was(arguments, message):
    model = adapted(CONFIGS["hqq4"])
    before, logits = bits_of(model), model(HELD_OUT).logits
    with pytest.raises(ValueError, match=message):
        pql.merge_back(model, **arguments)
    after = bits_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(HELD_OUT).logits, logits)


def test_a_nan_is_refused_by_the_layers_name():
    model = adapted(CONFIGS["hqq4"])
    before = bits_of(model)
    next(p for name, p in model.named_parameters() if "layers.1" in name and "lora_B" in name).data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1.*NaN"):
        pql.merge_back(model, strategy="calibrated", calibration=calibration())
    assert all(torch.equal(bits_of(model)[name], tensor) for name, tensor in before.items())


def test_groups_across_the_outputs_are_refused():
    model = adapted(HQQConfig(axis=0, group_size=16))
    with pytest.raises(ValueError, match="axis=1"):
        pql.merge_back(model, strategy="calibrated", calibration=calibration())


def test_a_merge_that_fails_half_way_puts_every_layer_back(monkeypatch):
    model = adapted(CONFIGS["hqq4"])
    before, logits = bits_of(model), model(HELD_OUT).logits
    calls = []

    from peft_quantlayers.merging import calibrated_rule

    original = calibrated_rule.for_outputs

    def breaks(plan, *args):
        calls.append(plan)
        if len(calls) == 5:
            raise RuntimeError("out of memory")
        return original(plan, *args)

    monkeypatch.setattr(calibrated_rule, "for_outputs", breaks)
    with pytest.raises(RuntimeError, match="out of memory"):
        pql.merge_back(model, strategy="calibrated", calibration=calibration())
    after = bits_of(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(model(HELD_OUT).logits, logits)


def test_a_merge_can_be_evaluated_and_saved(tmp_path):
    merged, report = pql.merge_back(
        adapted(CONFIGS["hqq4"]), strategy="calibrated", calibration=calibration(), evaluate_on=HELD_OUT.flatten()
    )
    assert report.capture.capture > 0.2
    pql.save_model(merged, tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(HELD_OUT).logits, merged(HELD_OUT).logits)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_asymmetric_targets_bring_the_outputs_nearer(config):
    found = []
    for is_asymmetric in (False, True):
        model = adapted(config, scale=0.1)
        with torch.no_grad():
            expected = model(HELD_OUT).logits
        merged, _ = pql.merge_back(
            model,
            strategy="calibrated",
            calibration=calibration(asymmetric_targets=is_asymmetric),
        )
        found.append(distance(merged, expected))
    assert found[1] < found[0]
