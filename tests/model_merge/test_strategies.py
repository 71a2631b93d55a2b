"""What holds for every strategy of merge_back, and what the report says of the whole model."""

import copy
import dataclasses
import json
from typing import get_args

import pytest
import torch
from every_method import methods_for, quick_config
from integrations.tiny import tiny_model, token_ids
from lora.test_layer import Two, assert_same_bits, bits_of, quantized_two, with_adapter
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig
from peft_quantlayers.formats import QuantSpec
from peft_quantlayers.merging import AdapterTraits, MergePlan, MergeResult, advice, merge_rules
from peft_quantlayers.merging.planned_merge import LayerInputs
from peft_quantlayers.merging.strategies import STRATEGIES, MergeStrategy, Strategy, rules_for

RULES = rules_for("lora")
CASES = [(strategy, method) for strategy in RULES for method in methods_for(strategy)]
pytestmark = pytest.mark.usefixtures("toy_method")


def model_for(strategy: str, method: str | None = None) -> PeftModel:
    """A model with an adapter of the kind that the strategy merges, of HQQ or else the first method that it is for."""
    torch.manual_seed(0)
    method = method or min(methods_for(strategy), key=lambda name: name != "hqq")
    base = pql.quantize_model(Two(), quick_config(method), progress=False)
    fields = {"use_qalora": True, "qalora_group_size": 32, "init_lora_weights": True} if strategy == "exact" else {}
    model = with_adapter(base, **fields)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        lora_B = layer.lora_B["default"].weight
        lora_B.data = 0.02 * torch.randn(lora_B.shape, generator=torch.Generator().manual_seed(3))
    if strategy == "aware":
        pql.enable_merge_aware(model)
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def test_the_registry_the_type_and_the_docstring_name_the_same_strategies():
    assert get_args(Strategy) == tuple(STRATEGIES)
    assert all(f'``"{name}"``' in pql.merge_back.__doc__ for name in STRATEGIES)
    assert all("lora" in strategy.rules or strategy.data_rules for strategy in STRATEGIES.values())


def test_a_strategy_is_one_entry_of_the_registry(monkeypatch):
    """Merging by it, its refusals and its recommendation follow from the entry."""
    entry = MergeStrategy(
        rules={"lora": merge_rules.requantize},
        fits=lambda facts: facts.is_plain,
        form="rounds to nearest",
        advice="what a plug-in has",
    )
    monkeypatch.setitem(STRATEGIES, "nearest", entry)
    report = pql.merge_back(model_for("requantize"), strategy="nearest", progress=False).report
    assert {layer.strategy for layer in report.layers} == {"requantize"}
    assert "nearest" in report.layers[0].strategies
    layers = [dataclasses.replace(layer, delta_retained=0.2) for layer in report.layers]
    said = advice.recommendation(layers, capture=None, output_retained=None, delta_retained=0.2)
    assert "what a plug-in has" in said
    with pytest.raises(ValueError, match="rounds to nearest"):
        pql.merge_back(model_for("requantize"), strategy="nearest", budget=3.0, calibration=[torch.ones(1, 4).long()])
    with pytest.raises(ValueError, match="takes no calibration data"):
        pql.merge_back(model_for("requantize"), strategy="nearest", calibration=[torch.ones(1, 4).long()])


def test_a_strategy_with_data_is_one_entry_of_the_registry(monkeypatch):
    """Layers that the data reaches go by its rule, others by the one for them; what it checks is refused at once."""
    seen, refused = [], []

    def rule(plan: MergePlan, spec: QuantSpec, inputs: LayerInputs) -> MergeResult:
        seen.append((plan.layer_name, spec, inputs.hessian.shape))
        return dataclasses.replace(merge_rules.requantize(plan), hessian=inputs.hessian)

    def check(adapters: AdapterTraits, spec: QuantSpec) -> None:
        if refused:
            raise ValueError("not this one.")

    monkeypatch.setitem(STRATEGIES, "weighed", MergeStrategy(data_rules={"lora": rule}, check=check))
    base = pql.quantize_model(tiny_model(), quick_config("hqq"), progress=False)
    widths = {name: layer.in_features for name, layer in pql.quantized_modules(base).items()}
    model = with_adapter(base, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    data = pql.Calibration(data=torch.arange(512) % 128, n_tokens=512, sequence_length=64)
    report = pql.merge_back(copy.deepcopy(model), strategy="weighed", calibration=data, progress=False).report
    assert [name for name, _, _ in seen] == [layer.name for layer in report.layers]
    assert all(layer.output_retained is not None for layer in report.layers)
    assert all(shape == (widths[name], widths[name]) for name, _, shape in seen)
    refused.append(True)
    with pytest.raises(ValueError, match=r"layers\.0.*not this one"):
        pql.merge_back(model, strategy="weighed", calibration=data, progress=False)


@pytest.mark.parametrize(("strategy", "method"), CASES)
def test_ten_merges_through_peft_leave_the_same_bits_and_outputs(strategy, method, x):
    model = model_for(strategy, method)
    pql.set_merge_strategy(model, strategy)
    bits = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(x)
    for _ in range(10):
        model.merge_adapter()
        assert model.base_model.model.first.merged
        model.unmerge_adapter()
    now = model.state_dict()
    assert now.keys() == bits.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in bits.items())
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(("strategy", "method"), [case for case in CASES if case[0] not in ("dense", "keep")])
def test_a_zero_adapter_changes_no_bit(strategy, method):
    model = model_for(strategy, method)
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].weight.data.zero_()
    before = [layer.quantized_weight for layer in pql.quantized_modules(model).values()]
    merged, report = pql.merge_back(model, strategy=strategy)
    for layer, weight in zip(pql.quantized_modules(merged).values(), before, strict=True):
        assert all(
            torch.equal(tensor, weight.tensors[name]) for name, tensor in layer.quantized_weight.tensors.items()
        )
    assert report.delta_retained == 1.0


@pytest.mark.parametrize("strategy", list(RULES))
def test_a_nan_is_refused_by_the_layers_name_and_nothing_changed(strategy):
    model = model_for(strategy)
    model.base_model.model.second.lora_B["default"].weight.data[0, 0] = float("nan")
    bits = bits_of(model)
    pql.set_merge_strategy(model, strategy)
    for call in (lambda: pql.merge_back(model, strategy=strategy), model.base_model.model.second.merge):
        with pytest.raises(ValueError, match="second"):
            call()
        assert_same_bits(model, bits)
        assert not any(getattr(model.base_model.model, name).merged for name in ("first", "second"))


@pytest.mark.parametrize("strategy", list(RULES))
def test_pefts_merge_and_unload_of_a_broken_adapter_changes_nothing_either(strategy, x):
    model = model_for(strategy)
    pql.set_merge_strategy(model, strategy)
    lora_B = model.base_model.model.second.lora_B["default"].weight
    kept = lora_B.data.clone()
    bits, expected = bits_of(model), model(x)
    lora_B.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="second"):
        model.merge_and_unload()
    assert_same_bits(model, bits)
    lora_B.data = kept
    assert torch.equal(model(x), expected)


def test_pefts_own_merge_of_a_broken_adapter_leaves_every_layer_as_it_was(x):
    model = model_for("requantize")
    lora_B = model.base_model.model.second.lora_B["default"].weight
    lora_B.data[0, 0] = float("inf")
    bits = bits_of(model)
    with pytest.raises(ValueError, match=r"second.*Nothing was merged"):
        model.merge_adapter()
    assert_same_bits(model, bits)
    assert not model.base_model.model.first.merged
    lora_B.data[0, 0] = 0.0
    model.merge_adapter()
    assert model.base_model.model.first.merged


@pytest.mark.parametrize(("strategy", "method"), CASES)
def test_merging_one_after_the_other_in_any_order_is_merging_the_sum(strategy, method, x):
    outputs = []
    for calls in ([["default"], ["other"]], [["default", "other"]], [["other"], ["default"]], [["other", "default"]]):
        model = model_for(strategy if strategy == "exact" else "requantize", method)
        fields = {"use_qalora": True, "qalora_group_size": 32} if strategy == "exact" else {"init_lora_weights": False}
        torch.manual_seed(3)
        model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], **fields))
        for layer in (model.base_model.model.first, model.base_model.model.second):
            torch.nn.init.normal_(layer.lora_B["other"].weight, std=0.1)
        if strategy == "aware":
            pql.enable_merge_aware(model, ["default", "other"])
        pql.set_merge_strategy(model, strategy)
        for names in calls:
            model.merge_adapter(names)
        outputs.append(model(x))
    assert all(torch.equal(each, outputs[0]) for each in outputs[1:])


def test_small_changes_of_adapters_survive_a_merge_without_data():
    model = model_for("requantize")
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.lora_B["default"].weight.data *= 0.2
    _, report = pql.merge_back(model, strategy="requantize")
    assert all(layer.delta_norm < 0.05 * layer.weight_norm for layer in report.layers)
    assert report.delta_retained == pytest.approx(1.0, abs=0.3)  # 0.0 to 0.2 when quantized from scratch


def test_a_change_beyond_the_range_of_codes_gets_a_new_grid(x):
    model = with_adapter(quantized_two())  # random adapters, as large as the weights
    base = model.base_model.model.first.get_base_layer()
    scale = base.scale.clone()
    _, report = pql.merge_back(model, strategy="requantize")
    assert not torch.equal(base.scale, scale)
    assert report.delta_retained > 0.9


def test_an_unknown_strategy_and_a_model_without_adapters_are_refused():
    with pytest.raises(ValueError, match="requantize"):
        pql.set_merge_strategy(model_for("requantize"), "magic")
    with pytest.raises(ValueError, match="no LoRA adapter"):
        pql.set_merge_strategy(quantized_two(), "dense")
    with pytest.raises(ValueError, match="merge_back"):
        pql.set_merge_strategy(model_for("requantize"), "calibrated")


def tiny_peft_model(nbits: int = 4) -> PeftModel:
    base = pql.quantize_model(tiny_model(), HQQConfig(nbits=nbits, group_size=32), progress=False)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    return model.train()


@pytest.mark.parametrize("adapters", [None, ["other"], ["default", "other"]])
def test_capture_compares_base_adapter_and_merged_model(adapters, tmp_path):
    from peft_quantlayers.evaluate import capture

    ids = token_ids().flatten()
    model, twin = tiny_peft_model(), tiny_peft_model().eval()
    twin.base_model.set_adapter(adapters or ["default"])
    scored = []

    def metric(candidate: torch.nn.Module) -> float:
        scored.append(candidate)
        return float(len(scored))

    merged, report = pql.merge_back(model, strategy="requantize", adapters=adapters, evaluate_on=ids, metric=metric)

    def base(batch: torch.Tensor) -> torch.Tensor:
        with twin.disable_adapter():
            return twin(batch).logits

    merged.eval()
    expected = capture(lambda b: twin(b).logits, base, lambda b: merged(b).logits, ids, window=len(ids))
    assert report.capture == expected
    assert 0 < expected.kl_adapter_merged < expected.kl_adapter_base
    assert scored == [model, merged]
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["capture"]["capture"] == expected.capture
    assert stored["scores"] == {"adapter": 1.0, "merged": 2.0}
    assert f"capture {expected.capture:.3f}" in str(report)


def test_a_refused_evaluation_leaves_the_model_in_training_as_it_was(x):
    model = tiny_peft_model()
    bits = bits_of(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="vector"):
        pql.merge_back(model, strategy="requantize", evaluate_on=token_ids())
    assert_same_bits(model, bits)
    assert model.training
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == trained


def test_the_report_recommends_what_keeps_more_where_little_is_kept():
    model = tiny_peft_model(nbits=1)
    _, report = pql.merge_back(model, strategy="requantize", evaluate_on=token_ids().flatten())
    assert report.capture.capture < 0.9
    assert "enable_merge_aware" in report.recommendation
    assert report.recommendation in str(report)
    assert "QA-LoRA" in report.recommendation  # and nothing that is for AQLM alone
    assert "append" not in report.recommendation
    _, lossless = pql.merge_back(tiny_peft_model(), strategy="keep", evaluate_on=token_ids().flatten())
    assert lossless.recommendation is None
    assert lossless.capture.capture == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("with_data", [False, True])
def test_an_appended_codebook_holds_more_of_the_change_in_the_published_format(with_data, x, tmp_path):
    def merged(strategy: str, **data) -> tuple[float, pql.MergeReport, torch.nn.Module]:
        model = get_peft_model(quantized_tiny(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.05
        with torch.no_grad():
            expected = model.eval()(token_ids()).logits
            result, report = pql.merge_back(model, strategy=strategy, progress=False, **data)
            return float((result(token_ids()).logits - expected).norm()), report, result

    data = (
        {"calibration": pql.Calibration(data=torch.randint(3, 128, (512,)), sequence_length=64)} if with_data else {}
    )
    error, report, model = merged("append", **data)
    assert error < 0.5 * merged("requantize")[0]
    assert report.delta_retained > 0.5  # with half a bit a weight; requantizing adds noise of several times the delta
    bits_more = report.bits[1] - report.bits[0]
    assert bits_more == pytest.approx(4 / 8 + 16 * 8 * 16 / (64 * 64), rel=0.5)  # codes, and a small layer's codebook
    layer = next(iter(pql.quantized_modules(model).values()))
    assert layer.spec.num_codebooks == 3
    pql.save_model(model, tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(loaded(token_ids()).logits, model(token_ids()).logits)


def test_aware_adapters_that_merge_like_any_other_are_named(caplog):
    model = tiny_peft_model()
    pql.enable_merge_aware(model)
    model.add_adapter("plain", LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "plain"])
    merge_rules._warn_of_other_rounding.cache_clear()
    caplog.clear()  # of what enable_merge_aware says of trained adapters
    with caplog.at_level("WARNING"):
        pql.merge_back(model)
    assert [record.message.count("['default'] were trained merge-aware") for record in caplog.records] == [1]


def test_appending_to_hqq_and_strategies_with_the_wrong_data_are_refused():
    model = model_for("requantize")
    with pytest.raises(NotImplementedError, match=r"first.*cannot be extended.*keep"):
        pql.merge_back(model, strategy="append")
    with pytest.raises(
        NotImplementedError, match=r"first.*cannot be extended.*keep"
    ):  # before the data is even looked at
        pql.merge_back(model, strategy="append", calibration="no data")
    with pytest.raises(ValueError, match="append"):
        pql.merge_back(model, strategy="requantize", calibration=torch.arange(100))


def quantized_tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return pql.quantize_model(tiny_model(), quick_config("aqlm"), progress=False)


@pytest.mark.parametrize(
    ("fields", "named", "not_named"),
    [
        ({}, ["aware", "keep", "calibrated", "QA-LoRA"], ["exact", "append", "dense"]),
        ({"lora_bias": True}, ["keep", "calibrated"], ["aware", "QA-LoRA"]),
        ({"use_dora": True}, ["dense", "calibrated"], ["aware", "keep", "QA-LoRA"]),
        ({"use_qalora": True, "qalora_group_size": 32}, ["exact", "calibrated", "dense"], ["aware", "keep"]),
    ],
    ids=["plain", "lora_bias", "dora", "qalora"],
)
def test_only_what_works_for_the_adapter_is_recommended(fields, named, not_named):
    model = with_adapter(quantized_two(nbits=1), **fields)
    report = pql.merge_back(model, strategy="requantize")[1]
    report = dataclasses.replace(
        report, layers=tuple(dataclasses.replace(e, delta_retained=0.1) for e in report.layers)
    )
    assert all(name in report.recommendation for name in named)
    assert not any(name in report.recommendation.replace("merges exactly", "") for name in not_named)


@pytest.mark.parametrize("strategy", ["exact", "aware"])
def test_the_way_out_of_a_refused_dora_is_one_that_dora_can_take(strategy):
    with pytest.raises(ValueError, match='"dense"') as caught:
        pql.merge_back(with_adapter(quantized_two(), use_dora=True), strategy=strategy)
    assert "keep" not in str(caught.value)
    assert "enable_merge_aware" not in str(caught.value)


def test_no_strategy_of_lora_is_recommended_for_other_tuners():
    torch.manual_seed(0)
    model = get_peft_model(quantized_two(nbits=1), LoHaConfig(r=2, target_modules=["first"], init_weights=False))
    report = pql.merge_back(model)[1]
    report = dataclasses.replace(
        report, layers=tuple(dataclasses.replace(e, delta_retained=0.1) for e in report.layers)
    )
    assert report.recommendation.endswith('Instead: strategy="dense", a float model, which loses nothing.')


@pytest.mark.parametrize("strategy", ["keep", "dense", "requantize"])
def test_aware_adapters_are_sent_to_the_merge_that_they_were_trained_for(strategy):
    model = tiny_peft_model()
    pql.enable_merge_aware(model)
    _, aware = pql.merge_back(copy.deepcopy(model))
    assert aware.to_dict()["strategy"] == "auto"
    assert {layer["strategy"] for layer in aware.to_dict()["layers"]} == {"aware"}
    assert str(aware).splitlines()[0] == "merged: aware"
    assert aware.recommendation is aware.not_measured is None
    _, other = pql.merge_back(model, strategy=strategy)
    assert 'only strategy="aware"' in other.recommendation
    assert "loses nothing" not in str(other)


def test_the_report_says_that_noise_was_not_measured_where_there_is_much_of_it():
    model = tiny_peft_model(nbits=2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.1
    _, measured = pql.merge_back(copy.deepcopy(model), evaluate_on=token_ids().flatten())
    assert measured.not_measured is None
    _, report = pql.merge_back(model)
    assert report.error_to_delta > 1
    assert "evaluate_on" in report.not_measured
    assert report.not_measured in str(report)


@pytest.mark.parametrize("strategy", ["requantize", "calibrated", "append", "dense", "keep", "auto"])
def test_a_merge_without_unloading_is_taken_back_bit_for_bit_and_unloads_later(strategy):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(quantized_tiny(), config) if strategy == "append" else tiny_peft_model()
    data = {"calibration": torch.randint(3, 128, (512,)), "progress": False} if strategy == "calibrated" else {}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model.eval()(token_ids()).logits
    merged, report = pql.merge_back(model, strategy=strategy, unload=False, **data)
    assert merged is model
    assert len(report.layers) == len(model.get_layer_status())
    with torch.no_grad():
        logits = model(token_ids()).logits
    for _ in range(3):
        model.unmerge_adapter()
        after = model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        with torch.no_grad():
            assert torch.equal(model(token_ids()).logits, expected)
        pql.merge_back(model, strategy=strategy, unload=False, **data)
    base = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(base(token_ids()).logits, logits)


def test_a_model_whose_adapters_are_gone_is_refused():
    model = tiny_peft_model()
    pql.merge_back(model)
    with pytest.raises(ValueError, match="no adapter any more"):
        pql.merge_back(model)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"adapters": 5}, "adapters must be a list of names, got int"),
        ({"metric": 3}, "metric must be a function of a model, got int"),
    ],
    ids=["adapters", "metric"],
)
def test_arguments_of_another_kind_are_refused_by_name(arguments, said):
    with pytest.raises(TypeError, match=said):
        pql.merge_back(tiny_peft_model(), **arguments)


def test_predictions_of_a_model_without_a_vocabulary_are_not_asked_for():
    base = pql.quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), pql.HQQConfig(nbits=4), progress=False)
    model = get_peft_model(base, LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"no vocabulary in its config.*metric="):
        pql.merge_back(model, evaluate_on=[1, 2, 3])
