"""LoftQ on quantized layers: codes and adapter together are nearer to the float weight than the codes alone."""

import copy

import pytest
import torch
from demo_model import demo_model_folder
from every_method import METHODS, methods_for, quick_config
from integrations.tiny import saved_tiny_model, tiny_model, token_ids
from lora.surfaces import Two, lora_layers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.methods import config_type, get_method
from peft_quantlayers.training.low_rank_approximation import low_rank_approximation

# HQQ with few bits, and every other method.
CONFIGS = {
    "hqq 2": pql.HQQConfig(nbits=2, group_size=32),
    "hqq 3": pql.HQQConfig(nbits=3, group_size=32),
} | {name: quick_config(name) for name in METHODS if name != "hqq"}
pytestmark = pytest.mark.usefixtures("toy_method")
BOTH = ["first", "second"]


@pytest.fixture(params=CONFIGS)
def config(request) -> pql.QuantConfig:
    return CONFIGS[request.param]


def float_model() -> nn.Module:
    torch.manual_seed(0)
    return Two()


def adapted(config: pql.QuantConfig, model: nn.Module | None = None, **fields) -> PeftModel:
    """The quantized model with an untrained adapter."""
    base = pql.quantize_model(model or float_model(), config, progress=False)
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(**{"r": 8, "lora_alpha": 12, "target_modules": BOTH} | fields))


def errors_of(model: PeftModel, reference: nn.Module) -> dict[str, float]:
    """Of codes and adapter together, for each layer, relative to the float weight."""
    weights = {name: reference.get_submodule(name).weight.detach() for name in lora_layers(model.get_base_model())}
    found = {}
    for name, layer in lora_layers(model.get_base_model()).items():
        rebuilt = layer.get_base_layer().dequantize(torch.float32) + layer.get_delta_weight("default").detach()
        found[name] = float((rebuilt - weights[name]).norm() / weights[name].norm())
    return found


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())


def test_the_error_falls_with_the_adapter_and_further_with_new_codes(config):
    plain, once, often = (adapted(config) for _ in range(3))
    first = pql.initialize_loftq(once, float_model(), progress=False)
    later = pql.initialize_loftq(often, float_model(), iterations=5, progress=False)
    errors = [errors_of(model, float_model()) for model in (plain, once, often)]
    for results, found in ((first, errors[1]), (later, errors[2])):
        assert [result.name for result in results] == BOTH
        assert [result.error_before for result in results] == pytest.approx(list(errors[0].values()), rel=1e-4)
        assert [result.error_after for result in results] == pytest.approx(list(found.values()), rel=1e-4)
    for name in BOTH:
        assert errors[2][name] < 0.99 * errors[1][name] < 0.99 * 0.9 * errors[0][name]
    assert not any(result.has_new_codes for result in first)
    assert all(result.has_new_codes for result in later)


@pytest.mark.parametrize("fields", [{}, {"use_rslora": True}, {"rank_pattern": {"first": 3}}])
def test_one_iteration_keeps_the_codes_and_finds_the_best_adapter_of_its_rank(config, fields):
    model = adapted(config, **fields)
    codes = {name: tensor for name, tensor in state_of(model).items() if "lora_" not in name}
    pql.initialize_loftq(model, float_model(), progress=False)
    assert_same_state(model, state_of(model) | codes)
    for name, layer in lora_layers(model.get_base_model()).items():
        lost = float_model().get_submodule(name).weight - layer.get_base_layer().dequantize(torch.float32)
        U, S, Vh = torch.linalg.svd(lost)
        rank = layer.r["default"]
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=1e-3, atol=1e-5)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-4, atol=0)


def test_a_layer_that_could_only_get_worse_stays_as_it_is(config):
    model = adapted(config)
    pql.initialize_loftq(model, float_model(), iterations=3, progress=False)
    before, errors = state_of(model), errors_of(model, float_model())
    results = pql.initialize_loftq(model, float_model(), progress=False)
    after = errors_of(model, float_model())
    assert all(after[name] <= errors[name] * (1 + 1e-6) for name in BOTH)
    assert_same_state(model, state_of(model) | {name: t for name, t in before.items() if "lora_" not in name})
    assert all(result.error_after <= result.error_before for result in results)


def test_codes_that_turn_out_worse_are_not_kept(config, monkeypatch):
    model, once = adapted(config), adapted(config)
    pql.initialize_loftq(once, float_model(), progress=False)
    method = type(model.base_model.model.first.get_base_layer().method)
    quantize = method.quantize
    monkeypatch.setattr(method, "quantize", lambda self, weight, *args, **kw: quantize(self, -weight, *args, **kw))
    results = pql.initialize_loftq(model, float_model(), iterations=3, progress=False)
    assert not any(result.has_new_codes for result in results)
    assert_same_state(model, state_of(once))


def test_calibrated_adapters_have_the_lowest_output_error_of_their_rank():
    generator = torch.Generator().manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        matrix, inputs = torch.randn(shape, generator=generator), torch.randn(200, shape[1], generator=generator)
        inputs[:, ::3] *= 8
        hessian = inputs.t() @ inputs / len(inputs)
        left, right = low_rank_approximation(matrix, 5, hessian=hessian)
        root = torch.linalg.cholesky(hessian.double())
        U, S, Vh = torch.linalg.svd(matrix.double() @ root)
        best = U[:, :5] * S[:5] @ Vh[:5] @ torch.linalg.inv(root)
        torch.testing.assert_close((left @ right).double(), best, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3"])
def test_calibration_brings_the_outputs_nearer_than_the_weights_alone(family):
    ids = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
    data = pql.Calibration(data=ids, n_tokens=640, sequence_length=40)
    reference = tiny_model(family)
    with torch.no_grad():
        expected = reference(ids).logits
    distances = []
    for calibration in (None, data):
        model = adapted(CONFIGS["hqq 2"], tiny_model(family), target_modules="all-linear").eval()
        codes = {name: t for name, t in state_of(model).items() if "lora_" not in name}
        results = pql.initialize_loftq(model, reference, calibration=calibration, progress=False)
        assert all(result.error_after < result.error_before for result in results)
        assert_same_state(model, state_of(model) | codes)
        with torch.no_grad():
            distances.append(float((model(ids).logits - expected).norm()))
    assert distances[1] < 0.95 * distances[0]


def test_calibrated_new_codes_lower_the_error_further_and_a_failure_restores_all(monkeypatch):
    ids = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
    once, often = (adapted(CONFIGS["hqq 2"], tiny_model(), target_modules="all-linear") for _ in range(2))
    first = pql.initialize_loftq(once, tiny_model(), calibration=ids, progress=False)
    later = pql.initialize_loftq(often, tiny_model(), iterations=3, calibration=ids, progress=False)
    assert [result.name for result in later] == [result.name for result in first]
    assert any(result.has_new_codes for result in later)
    assert sum(r.error_after for r in later) < sum(r.error_after for r in first)
    model = adapted(CONFIGS["hqq 2"], tiny_model(), target_modules="all-linear")
    before = state_of(model)
    broken_model = tiny_model()
    broken_model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN"):
        pql.initialize_loftq(model, broken_model, calibration=ids, progress=False)
    assert_same_state(model, before)


def test_what_calibration_cannot_do_is_refused():
    ids = torch.randint(3, 128, (16, 40))
    model = adapted(pql.HQQConfig(nbits=3, group_size=32, axis=0), tiny_model(), target_modules="all-linear")
    with pytest.raises(ValueError, match="Use iterations=1"):
        pql.initialize_loftq(model, tiny_model(), iterations=2, calibration=ids, progress=False)
    data = pql.Calibration(data=ids, finetune_epochs=2)
    with pytest.raises(ValueError, match="makes no use of finetune_epochs"):
        pql.initialize_loftq(model, tiny_model(), calibration=data, progress=False)


@pytest.mark.real_model
@pytest.mark.parametrize(
    ("method", "fields"),
    [("hqq", {"nbits": 2}), ("hqq", {"nbits": 3}), *((name, {}) for name in methods_for("calibrated"))],
    ids=str,
)
def test_the_error_of_a_layer_of_smollm2_falls(method, fields):
    config = config_type(get_method(method).spec_type)(**fields)
    with safe_open(str(demo_model_folder() / "model.safetensors"), "pt") as file:
        weight = file.get_tensor("model.layers.2.self_attn.o_proj.weight")
    linear = nn.Linear(576, 576, bias=False)
    linear.weight.data = weight
    reference = nn.Sequential(linear)
    model = adapted(config, copy.deepcopy(reference), r=16, target_modules=["0"])
    (result,) = pql.initialize_loftq(model, reference, iterations=3, progress=False)
    # Measured: 0.349 to 0.303, 0.174 to 0.154, 0.298 to 0.267.
    assert result.error_after < 0.91 * result.error_before
    assert errors_of(model, reference)["0"] == pytest.approx(result.error_after, rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 3])
def test_base_and_adapter_come_back_from_their_folders(config, iterations, tmp_path):
    saved_tiny_model(tmp_path / "float")
    model = adapted(config, tiny_model(), target_modules="all-linear").eval()
    base_codes = {name: t for name, t in state_of(model).items() if "lora_" not in name}
    pql.initialize_loftq(model, tmp_path / "float", iterations=iterations, progress=False)
    expected = model(token_ids()).logits
    model.save_pretrained(tmp_path / "adapter")
    has_same_base = all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base_codes.items())
    assert has_same_base == (iterations == 1)
    pql.save_model(model.unload(), tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(token_ids()).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_float_weights_may_come_from_a_model_from_one_file_or_from_many(family, tmp_path):
    saved_tiny_model(tmp_path / "whole", family)
    tiny_model(family).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    states = []
    for source in (tiny_model(family), tmp_path / "whole", str(tmp_path / "shards")):
        model = adapted(CONFIGS["hqq 2"], tiny_model(family), target_modules="all-linear")
        results = pql.initialize_loftq(model, source, progress=False)
        assert all(result.error_after < 0.95 * result.error_before for result in results)
        states.append(state_of(model))
    assert_same_state(model, states[0])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_adapters_added_by_transformers_are_initialized_too():
    model = pql.quantize_model(tiny_model(), CONFIGS["hqq 3"], progress=False)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="mine")
    results = pql.initialize_loftq(model, tiny_model(), adapter="mine", progress=False)
    assert len(results) == 2
    assert all(result.error_after < result.error_before for result in results)


def broken(model: nn.Module) -> nn.Module:
    model.second.weight.data[0, 0] = float("nan")
    return model


def renamed(model: nn.Module) -> nn.Module:
    return nn.ModuleDict({"first": model.first, "third": model.second})


def other(model: nn.Module) -> nn.Module:
    model.second.weight.data = model.second.weight.data.flip(1)
    return model


@pytest.mark.parametrize(
    ("reference", "options", "message"),
    [
        (float_model(), {"iterations": 0}, "iterations=0"),
        (float_model(), {"adapter": "other"}, "adapter 'other' is on no quantized layer"),
        (broken(float_model()), {}, "second: the float weight holds NaN"),
        (renamed(float_model()), {}, "no weight for 1 of 2 layers, for example 'second'"),
        (other(float_model()), {}, "second: .*is another model"),
        (pql.quantize_model(float_model(), CONFIGS["hqq 3"], progress=False), {}, "first: .*quantized itself"),
        (nn.ModuleDict({"first": float_model().first, "second": nn.Linear(64, 96)}), {}, "second: .*has shape"),
        ("no/such-model", {}, "float_model='no/such-model' is not a folder"),
    ],
    ids=["iterations", "adapter", "nan", "missing", "another model", "quantized", "shape", "not found"],
)
def test_a_refused_call_leaves_the_model_as_it_was(reference, options, message):
    model = adapted(CONFIGS["hqq 3"])
    state = state_of(model)
    with pytest.raises(ValueError, match=message):
        pql.initialize_loftq(model, reference, progress=False, **{"iterations": 2} | options)
    assert_same_state(model, state)


def test_adapters_that_loftq_does_not_fit_are_refused():
    with pytest.raises(NotImplementedError, match=r"first: .*more than plain LoRA"):
        pql.initialize_loftq(adapted(CONFIGS["hqq 3"], use_dora=True), float_model())
    with pytest.raises(ValueError, match="rank 65"):
        pql.initialize_loftq(adapted(CONFIGS["hqq 3"], r=65), float_model())
    aware = adapted(CONFIGS["hqq 3"])
    pql.enable_merge_aware(aware)
    with pytest.raises(ValueError, match="merge-aware already"):
        pql.initialize_loftq(aware, float_model())
    merged = adapted(CONFIGS["hqq 3"], init_lora_weights=False)
    merged.merge_adapter()
    with pytest.raises(ValueError, match="are merged"):
        pql.initialize_loftq(merged, float_model())
    shared = adapted(CONFIGS["hqq 3"])
    shared.add_adapter("other", LoraConfig(r=2, target_modules=["second"]))
    with pytest.raises(ValueError, match=r"second: .*'other'"):
        pql.initialize_loftq(shared, float_model(), iterations=2)
    pql.initialize_loftq(shared, float_model(), progress=False)
