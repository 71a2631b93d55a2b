"""merge_back: its strategies, its report, and that a refused call changes nothing."""

import json
from importlib import import_module

import pytest
import torch
from integrations.tiny import tiny_model, token_ids
from lora.test_layer import assert_same_bits, bits_of, quantized_two, with_adapter
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig, LoraQuantizedLinear


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(2))


def test_dense_gives_a_plain_model_that_computes_what_the_adapter_did(x):
    model = with_adapter(quantized_two())
    expected = model(x)
    merged, report = pql.merge_back(model, strategy="dense")
    assert type(merged.first) is nn.Linear
    torch.testing.assert_close(merged(x), expected)
    assert report.delta_retained == pytest.approx(1.0, abs=1e-5)
    assert report.relative_error == pytest.approx(0.0, abs=1e-6)
    assert [layer.bits_after for layer in report.layers] == [32.0, 32.0]


def test_dense_also_dequantizes_layers_without_an_adapter(x):
    model = with_adapter(quantized_two(), target_modules=["first"])
    expected = model(x)
    merged, _ = pql.merge_back(model, strategy="dense")
    assert not pql.quantized_modules(merged)
    torch.testing.assert_close(merged(x), expected)


def test_dense_after_a_merge_starts_from_the_unmerged_weight(x):
    model = with_adapter(quantized_two())
    expected = model(x)
    model.merge_adapter()
    merged, _ = pql.merge_back(model, strategy="dense")
    torch.testing.assert_close(merged(x), expected)


def test_requantize_reports_each_layer_and_the_total(x, tmp_path):
    model = with_adapter(quantized_two(nbits=8))
    first = model.base_model.model.first
    before = first.get_base_layer().dequantize(torch.float32)
    delta = first.get_delta_weight("default").detach()
    merged, report = pql.merge_back(model)

    layer = report.layers[0]
    error = merged.first.dequantize(torch.float32) - (before + delta)
    assert [entry.name for entry in report.layers] == ["first", "second"]
    assert layer.delta_norm == pytest.approx(delta.norm().item(), rel=1e-5)
    assert layer.error_norm == pytest.approx(error.norm().item(), rel=1e-5)
    retained = ((merged.first.dequantize(torch.float32) - before) * delta).sum() / delta.square().sum()
    assert layer.delta_retained == pytest.approx(retained.item(), rel=1e-4)
    assert 0.9 < report.delta_retained < 1.1
    total_error = sum(entry.error_norm**2 for entry in report.layers) ** 0.5
    total_weight = sum(entry.weight_norm**2 for entry in report.layers) ** 0.5
    assert report.relative_error == pytest.approx(total_error / total_weight)

    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["delta_retained"] == report.delta_retained
    assert len(stored["layers"]) == 2
    assert str(report).splitlines()[-1].startswith("total")


def test_only_the_named_adapters_are_merged(x):
    model = with_adapter(quantized_two(nbits=8))
    expected = model(x)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    merged, report = pql.merge_back(model, strategy="dense", adapters=["default"])
    torch.testing.assert_close(merged(x), expected)
    assert {layer.adapters for layer in report.layers} == {("default",)}


def test_an_adapter_on_dense_layers_beside_the_quantized_ones_is_merged_too(x):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    base = pql.quantize_model(dense, HQQConfig(nbits=8, group_size=32, skip_modules=["1"]), progress=False)
    model = with_adapter(base, target_modules=["0", "1"])
    expected = model(x)
    merged, report = pql.merge_back(model)
    assert type(merged[1]) is nn.Linear
    assert len(report.layers) == 1
    assert (merged(x) - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("strategy", ["requantize", "dense"])
def test_a_broken_adapter_is_refused_by_name_and_the_model_is_left_as_it_was(strategy, x):
    model = with_adapter(quantized_two())
    model.base_model.model.second.lora_B["default"].weight.data[0, 0] = float("inf")
    bits = bits_of(model)
    with pytest.raises(ValueError, match="second"):
        pql.merge_back(model, strategy=strategy)
    assert isinstance(model, PeftModel)
    assert_same_bits(model, bits)
    assert not model.base_model.model.first.merged


@pytest.mark.parametrize("strategy", ["requantize", "dense"])
def test_a_layer_that_fails_half_way_leaves_all_layers_unmerged(strategy, x, monkeypatch):
    model = with_adapter(quantized_two())
    expected, bits = model(x), bits_of(model)
    second = model.base_model.model.second
    monkeypatch.setattr(second, "get_delta_weight", lambda adapter: torch.full((64, 96), float("nan")))
    with pytest.raises(ValueError, match="second"):
        pql.merge_back(model, strategy=strategy)
    assert_same_bits(model, bits)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [({"strategy": "magic"}, "requantize"), ({"adapters": ["missing"]}, "missing"), ({"adapters": []}, "default")],
)
def test_an_unknown_strategy_or_adapter_is_refused(arguments, match):
    with pytest.raises(ValueError, match=match):
        pql.merge_back(with_adapter(quantized_two()), **arguments)


@pytest.mark.parametrize("strategy", ["aware", "exact", "keep", "dense", "requantize", "append", "calibrated"])
def test_layers_without_the_named_adapters_are_left_alone_and_not_reported(strategy):
    config = AQLMConfig(nbits_per_codebook=4, rounds=1) if strategy == "append" else HQQConfig(group_size=32)
    fields = {"use_qalora": True, "qalora_group_size": 32} if strategy == "exact" else {}
    base = pql.quantize_model(tiny_model(), config, progress=False)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **fields), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["v_proj"], **fields))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    if strategy == "aware":
        pql.enable_merge_aware(model, ["a"])
    layer = model.base_model.model.model.layers[0].self_attn.v_proj
    tensors = dict(layer.get_base_layer().quantized_weight.tensors)
    calibration = token_ids().repeat(8, 1) if strategy == "calibrated" else None
    merged, report = pql.merge_back(model, strategy=strategy, adapters=["a"], calibration=calibration, progress=False)
    assert [entry.name for entry in report.layers] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    if strategy != "dense":
        after = merged.model.layers[0].self_attn.v_proj.quantized_weight.tensors
        assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())


def test_modules_to_save_keep_their_trained_copy(x):
    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = quantized_two(nbits=8)
            self.head = nn.Linear(64, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(x))

    config = LoraConfig(r=2, target_modules=["first", "second"], modules_to_save=["head"], init_lora_weights=False)
    model = get_peft_model(WithHead(), config)
    model.base_model.model.head.modules_to_save["default"].weight.data.add_(1.0)
    expected = model(x)
    merged, _ = pql.merge_back(model)
    assert type(merged.head) is nn.Linear
    assert (merged(x) - expected).norm() < 0.01 * expected.norm()


def test_a_model_that_is_no_peft_model_and_a_bare_name_are_refused():
    with pytest.raises(TypeError, match="PeftModel"):
        pql.merge_back(quantized_two())
    with pytest.raises(TypeError, match=r"\['default'\]"):
        pql.merge_back(with_adapter(quantized_two()), adapters="default")


def replicated(**fields) -> PeftModel:
    """Three layers made of two, with an adapter of its own on each."""
    base = pql.quantize_model(tiny_model(), HQQConfig(nbits=8, group_size=32), progress=False)
    fields = {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | fields
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, layer_replication=[(0, 2), (0, 1)], **fields)).eval()


@pytest.mark.parametrize("fields", [{}, {"lora_bias": True, "target_modules": ["q_proj"]}], ids=["plain", "lora_bias"])
def test_replicas_of_a_layer_merge_each_its_own_adapter_and_unmerge_to_the_shared_weight(fields):
    ids = token_ids()
    model = replicated(**fields)
    expected, bits = model(ids).logits, bits_of(model)
    with model.disable_adapter():
        base = model(ids).logits
    layers = [layer.self_attn.q_proj.get_base_layer() for layer in model.base_model.model.model.layers]

    model.merge_adapter()
    assert (model(ids).logits - expected).norm() < 0.1 * (base - expected).norm()
    model.unmerge_adapter()
    assert_same_bits(model, bits)
    assert torch.equal(model(ids).logits, expected)
    assert all(mine is other for mine, other in zip(layers[0].parameters(), layers[2].parameters(), strict=True))

    merged, report = pql.merge_back(model)
    assert len(report.layers) == (3 if "target_modules" in fields else 6)
    assert (merged(ids).logits - expected).norm() < 0.1 * (base - expected).norm()


def language_model() -> PeftModel:
    base = pql.quantize_model(tiny_model(), HQQConfig(nbits=4, group_size=32), progress=False)
    return with_adapter(base, target_modules=["q_proj"]).eval()


@pytest.mark.parametrize(
    ("held_out", "error", "match"),
    [
        ("some text", TypeError, "tokenizer"),
        (["some", "text"], TypeError, "tokenizer"),
        (token_ids().flatten().float(), TypeError, "float32"),
        (token_ids(), ValueError, r"\(2, 9\)"),
        ([5], ValueError, "2 token"),
        ([], ValueError, "2 token"),
        (torch.tensor(5), ValueError, "2 token"),
        ([5, 128], ValueError, "128"),
        ([5, -1], ValueError, "-1"),
    ],
)
def test_what_cannot_be_evaluated_on_is_refused_before_anything_is_done(held_out, error, match, monkeypatch):
    model = language_model()
    monkeypatch.setattr(LoraQuantizedLinear, "merge_by", lambda *args: pytest.fail("merged"))
    with pytest.raises(error, match=match):
        pql.merge_back(model, evaluate_on=held_out, metric=lambda model: pytest.fail("scored"))


def test_without_unloading_active_adapters_and_what_is_trained_stay_as_they_were(x):
    model = with_adapter(quantized_two())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    expected = model(x)
    merged, _ = pql.merge_back(model, adapters=["other"], unload=False)
    assert merged is model
    model.unmerge_adapter()
    assert model.active_adapters == ["default", "other"]
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(x), expected)


def test_a_dense_layer_that_fails_in_pefts_merge_leaves_all_layers_unmerged(x, monkeypatch):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    base = pql.quantize_model(dense, HQQConfig(nbits=4, group_size=32, skip_modules=["1", "2"]), progress=False)
    model = with_adapter(base, target_modules=["0", "1", "2"])
    expected = model(x)
    layers = [getattr(model.base_model.model, name) for name in "012"]

    def fail(*args, **kwargs):
        raise RuntimeError("no more memory")

    monkeypatch.setattr(layers[2], "merge", fail)
    for unload in (True, False):
        with pytest.raises(RuntimeError, match="no more memory"):
            pql.merge_back(model, unload=unload)
        assert not any(layer.merged for layer in layers)
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("unload", [True, False])
def test_a_dense_layer_that_peft_cannot_merge_leaves_the_model_as_it_was(unload, x):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    base = pql.quantize_model(dense, HQQConfig(nbits=4, group_size=32, skip_modules=["1", "2"]), progress=False)
    model = with_adapter(base, target_modules=["0", "1", "2"], lora_bias=True)
    expected, names = model(x), list(model.state_dict())
    with pytest.raises(ValueError, match=r"\b2: lora_bias"):
        pql.merge_back(model, unload=unload)
    assert list(model.state_dict()) == names
    assert not any(getattr(model.base_model.model, name).merged for name in "012")
    torch.testing.assert_close(model(x), expected)


def test_an_adapter_on_a_weight_that_two_layers_share_is_refused():
    base = pql.quantize_model(tiny_model("llama-tied"), HQQConfig(nbits=4, group_size=32), progress=False)
    model = with_adapter(base, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"lm_head.*tie_word_embeddings=False"):
        pql.merge_back(model, evaluate_on=token_ids()[0])
    assert isinstance(model, PeftModel)


def test_an_effect_that_rounding_hides_is_not_called_lost():
    model = language_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-7
    _, report = pql.merge_back(model, strategy="dense", evaluate_on=token_ids()[0])
    assert "too small to measure" in str(report)
    assert report.to_dict()["capture"]["capture"] is None
    assert report.recommendation is None


@pytest.mark.parametrize("strategy", ["requantize", "aware", "dense", "keep", "calibrated", "loha"])
def test_the_report_says_what_is_left_of_each_layers_outputs_on_the_held_out_tokens(strategy):
    base = pql.quantize_model(tiny_model(), HQQConfig(nbits=3, group_size=32), progress=False)
    if strategy == "loha":
        torch.manual_seed(1)
        config = LoHaConfig(r=2, target_modules=["q_proj", "down_proj"], init_weights=False)
        model, strategy = get_peft_model(base, config).eval(), "requantize"
    else:
        model = with_adapter(base, target_modules=["q_proj", "down_proj"]).eval()
    if strategy == "aware":
        pql.enable_merge_aware(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    ids = token_ids()[:1]
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.extend(args))
    with torch.no_grad():
        model(ids)
        handle.remove()
        before, adapter = layer.base_layer(inputs[0]), layer(inputs[0])
        extra = {"calibration": token_ids().repeat(1, 40), "progress": False} if strategy == "calibrated" else {}
        merged, report = pql.merge_back(model, strategy=strategy, evaluate_on=ids[0], **extra)
        after = merged.get_submodule("model.layers.1.mlp.down_proj")(inputs[0])
    delta, moved = adapter - before, after - before
    retained = float((moved * delta).sum() / delta.square().sum())
    [entry] = [each for each in report.layers if each.name.endswith("layers.1.mlp.down_proj")]
    assert entry.output_retained == pytest.approx(retained, rel=1e-3)
    assert entry.output_noise == pytest.approx(
        float((moved - retained * delta).norm() / delta.norm()), rel=1e-2, abs=1e-3
    )
    assert "output retained" in str(report)
    if strategy in ("aware", "dense", "keep"):
        assert (report.output_retained, report.output_noise) == pytest.approx((1.0, 0.0), abs=1e-3)


def test_held_out_ids_may_be_a_row_or_a_list():
    ids = token_ids()[0]
    captures = [
        pql.merge_back(language_model(), evaluate_on=given)[1].capture
        for given in (ids, ids[None], ids.tolist(), [ids.tolist()], ids.numpy(), {"input_ids": ids[None]})
    ]
    assert all(each == captures[0] for each in captures[1:])
    assert captures[0].n_tokens == 8


def test_a_metric_that_fails_after_the_merge_leaves_the_model_as_it_was(x):
    model = with_adapter(quantized_two())
    bits, expected = bits_of(model), model(x)
    for result in (RuntimeError("no more memory"), "high", float("nan")):
        results = [1.0, result]

        def metric(model: nn.Module) -> float:
            value = results.pop(0)  # noqa: B023
            if isinstance(value, Exception):
                raise value
            return value

        with pytest.raises((RuntimeError, TypeError, ValueError), match=r"no more memory|got str|NaN"):
            pql.merge_back(model, metric=metric)
        assert not results
        assert_same_bits(model, bits)
        assert torch.equal(model(x), expected)


def test_a_metric_gives_a_number_or_is_refused_before_the_merge(x, monkeypatch):
    _, report = pql.merge_back(with_adapter(quantized_two(nbits=8)), metric=lambda model: model(x).mean())
    assert type(report.scores[0]) is type(report.scores[1]) is float
    assert report.scores[0] == pytest.approx(report.scores[1], abs=0.05)
    json.dumps(report.to_dict())
    monkeypatch.setattr(LoraQuantizedLinear, "merge_by", lambda *args: pytest.fail("merged"))
    for value in ({"accuracy": 1.0}, None, torch.ones(2), "1.0"):
        with pytest.raises(TypeError, match="number"):
            pql.merge_back(with_adapter(quantized_two()), metric=lambda model, value=value: value)


def test_the_metric_sees_the_named_adapters_only(x):
    model = with_adapter(quantized_two(nbits=8))
    expected = float(model(x).norm())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.set_adapter("other")
    merged, report = pql.merge_back(model, adapters=["default"], metric=lambda model: model(x).norm())
    assert report.scores == (pytest.approx(expected), pytest.approx(float(merged(x).norm())))


def test_the_named_adapters_modules_to_save_are_kept_though_another_one_is_active(x):
    base = nn.Sequential(quantized_two(nbits=8), nn.Linear(64, 3))
    fields = {"r": 2, "target_modules": ["first"], "modules_to_save": ["1"]}
    model = get_peft_model(base, LoraConfig(**fields))
    model.base_model.model[1].modules_to_save["default"].weight.data.add_(1.0)
    expected = model(x)
    model.add_adapter("other", LoraConfig(**fields))
    model.set_adapter("other")
    merged, _ = pql.merge_back(model, adapters=["default"])
    torch.testing.assert_close(merged(x), expected)


@pytest.mark.parametrize(
    ("fields", "broken"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
        ({"bias": "all"}, "layers.1.self_attn.v_proj.bias"),
        ({"bias": "lora_only"}, "layers.1.self_attn.q_proj.base_layer.bias"),
        ({"trainable_token_indices": [3, 4]}, "trainable_tokens_delta.default"),
    ],
    ids=["modules_to_save", "all biases", "biases", "tokens"],
)
def test_what_was_trained_beside_the_adapter_must_be_finite_too(fields, broken):
    base = pql.quantize_model(tiny_model(), HQQConfig(nbits=4, group_size=32), progress=False)
    model = with_adapter(base, target_modules=["q_proj"], **fields)
    next(parameter for name, parameter in model.named_parameters() if name.endswith(broken)).data[0] = torch.nan
    with pytest.raises(ValueError, match=rf"{broken} holds NaN"):
        pql.merge_back(model, strategy="dense")
    assert len(pql.quantized_modules(model)) == 14
    assert not any(module.merged for module in model.modules() if isinstance(module, LoraQuantizedLinear))


def test_an_adapter_named_twice_is_refused():
    with pytest.raises(ValueError, match="once"):
        pql.merge_back(with_adapter(quantized_two()), adapters=["default", "default"])


@pytest.mark.parametrize("strategy", ["requantize", "dense"])
def test_an_adapter_that_is_merged_already_is_not_dropped_in_silence(strategy, x):
    model = with_adapter(quantized_two(nbits=8))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    model.merge_adapter(["default"])
    merged = model(x)
    with pytest.raises(ValueError, match=r"(?s)default.*unmerge_adapter"):
        pql.merge_back(model, strategy=strategy, adapters=["other"])
    assert torch.equal(model(x), merged)
    _, report = pql.merge_back(model, strategy=strategy, adapters=["default", "other"])
    assert report.layers[0].adapters == ("default", "other")


def test_freed_memory_goes_back_while_layers_are_merged(x, monkeypatch):
    returned, merge_back = [], import_module("peft_quantlayers.model_merge.merge_back")
    monkeypatch.setattr(merge_back, "return_free_memory", lambda: returned.append(True))
    monkeypatch.setattr(merge_back, "BYTES_BEFORE_RETURN", 1)
    pql.merge_back(with_adapter(quantized_two()), progress=False)
    assert len(returned) == 2
