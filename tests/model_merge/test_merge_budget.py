"""Merges under a budget: planned for the unmerged model, exact in bytes, saved, undone to the bit, refused by name."""

import copy
import logging
from functools import cache

import pytest
import torch
from calibration.other_models import MODELS
from every_method import quick_config
from integrations.tiny import tiny_model
from model_merge.test_merge_other_models import adapted as adapted_other
from peft import IA3Config, LoHaConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import BitPlan, Calibration, HQQConfig, plan_merge_bits
from peft_quantlayers.layers.quantized_layers import quantized_layers

IDS = torch.randint(3, 128, (8, 40), generator=torch.Generator().manual_seed(0))
DATA = Calibration(data=IDS, n_tokens=320, sequence_length=80)
CONFIG = HQQConfig(nbits=3, group_size=16)
STRATEGIES = ("calibrated", "requantize")


def adapted(family: str = "llama", config: pql.QuantConfig = CONFIG, adapter=None) -> nn.Module:
    base = tiny_model(family)
    base.get_output_embeddings().weight.data.mul_(20)  # random weights alone predict nothing
    pql.quantize_model(base, config, progress=False)
    torch.manual_seed(3)
    model = get_peft_model(base, adapter or LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "ia3_l" in name:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


@cache
def plan_at_5() -> BitPlan:
    return plan_merge_bits(adapted(), DATA, average=5.0, progress=False)


def stored_bytes(model: nn.Module) -> int:
    return sum(t.nbytes for layer in quantized_layers(model).values() for t in layer.quantized_weight.tensors.values())


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": tensor.clone()
        for name, layer in quantized_layers(model).items()
        for key, tensor in layer.quantized_weight.tensors.items()
    }


def divergence(model: nn.Module, teacher: torch.Tensor) -> float:
    with torch.no_grad():
        ours = model(IDS).logits.log_softmax(-1)
    return float((teacher.exp() * (teacher - ours)).sum(-1).mean())


@pytest.mark.parametrize(
    ("family", "strategy"),
    [("llama", "requantize"), ("llama-tied", "calibrated"), ("gpt2", "calibrated"), ("gemma3", "requantize")],
)
def test_layers_take_planned_bits_are_saved_and_undone_to_the_bit(family, strategy, tmp_path, caplog):
    model = adapted(family)
    before, layers = tensors(model), len(quantized_layers(model))
    plan = plan_merge_bits(model, DATA, average=5.5, strategy=strategy, progress=False)
    after = tensors(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())  # planning changes nothing
    assert plan.bits_per_weight <= 5.5
    with caplog.at_level(logging.INFO):
        merged, report = pql.merge_back(
            copy.deepcopy(model), strategy=strategy, calibration=DATA, budget=plan, progress=False
        )
    assert f"predicted KL {plan.predicted_kl:.4f}, measured {plan.measured_kl:.4f}" in caplog.text
    assert len(quantized_layers(merged)) == layers
    assert stored_bytes(merged) == plan.n_bytes
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in merged.state_dict().values()}
    assert sum(tensor.nbytes for tensor in held.values()) == plan.model_bytes
    widths = {name: layer.spec.nbits for name, layer in quantized_layers(merged).items()}
    assert len(set(widths.values())) > 1
    assert {layer.name: round(layer.bits_after) for layer in report.layers} == {
        name: round(layer.bits_per_weight) for name, layer in quantized_layers(merged).items()
    }
    assert report.bits[1] == pytest.approx(plan.bits_per_weight, rel=1e-6)
    pql.save_model(merged, tmp_path / "merged")
    loaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded(IDS).logits, merged(IDS).logits)
    still, _ = pql.merge_back(model, strategy=strategy, calibration=DATA, budget=plan, unload=False, progress=False)
    assert all(layer.spec.nbits == widths[name.removeprefix("base_model.model.").removesuffix(".base_layer")]
               for name, layer in quantized_layers(still).items())  # fmt: skip
    still.unmerge_adapter()
    after = tensors(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_predicted_divergence_is_measured_and_a_larger_budget_is_nearer_to_the_unmerged_model(strategy):
    model = adapted()
    with torch.no_grad():
        teacher = model(IDS).logits.log_softmax(-1)
    plan = plan_merge_bits(model, DATA, average=6.0, strategy=strategy, progress=False)
    given = {"strategy": strategy, "calibration": DATA, "progress": False}
    least = plan.with_budget(average=4.5)
    fewer = divergence(pql.merge_back(copy.deepcopy(model), budget=least, **given).model, teacher)
    more = divergence(pql.merge_back(model, budget=plan, **given).model, teacher)
    assert more < fewer
    assert 0.25 < plan.measured_kl / plan.predicted_kl < 4


def test_a_layer_with_a_large_delta_that_matters_gets_more_bits():
    """The plan is one of base and adapter, not of the base."""
    model, plan = adapted(), copy.deepcopy(plan_at_5())
    name = min(plan.layers, key=lambda each: plan.layers[each][0].kl)
    module = model.get_base_model().get_submodule(name)
    with torch.no_grad():  # a delta far beyond the range of this layer's own weight
        module.lora_B["default"].weight.mul_(40)
    other = plan_merge_bits(model, DATA, average=5.0, progress=False)
    assert other.layers[name][0].kl > 4 * plan.layers[name][0].kl


def test_a_number_a_size_and_a_file_do_what_the_plan_does(tmp_path):
    model, plan = adapted(), copy.deepcopy(plan_at_5())
    plan.save(tmp_path / "plan.json")
    assert BitPlan.load(tmp_path / "plan.json") == plan
    found = []
    for budget in (5.0, tmp_path / "plan.json", f"{plan.model_bytes / 1000}KB"):
        merged, _ = pql.merge_back(
            copy.deepcopy(model), strategy="calibrated", calibration=DATA, budget=budget, progress=False
        )
        found.append(tensors(merged))
    for other in found[1:]:
        assert set(other) == set(found[0])
        assert all(torch.equal(tensor, found[0][key]) for key, tensor in other.items())
    # A plan needs no data, and then none is used.
    merged, report = pql.merge_back(model, budget=plan, progress=False)
    assert {layer.strategy for layer in report.layers} == {"requantize"}
    assert stored_bytes(merged) == plan.n_bytes


@pytest.mark.parametrize(
    ("config", "choices"),
    # By hand: the choices are fields of one method each.
    [
        (quick_config("aqlm"), [1, 2]),
        (CONFIG, [{"nbits": 2, "group_size": 32}, {"nbits": 3, "group_size": 16}]),
        (HQQConfig(nbits=3, group_size=16, double_quant=True), None),
        (pql.NF4Config(), [{"block_size": 32}, {"block_size": 16}]),
    ],
    ids=["aqlm", "groups", "double-quant", "nf4"],
)
def test_other_methods_and_fields(config, choices):
    model = adapted(config=config)
    strategy = "requantize" if config.method == "nf4" else "calibrated"  # calibrated NF4 takes long
    largest = plan_merge_bits(model, DATA, average=32.0, choices=choices, strategy=strategy, progress=False)
    least = 8 * sum(min(c.n_bytes for c in each) for each in largest.layers.values()) / largest.n_weights
    plan = largest.with_budget(average=0.5 * (largest.bits_per_weight + least))
    merged, _ = pql.merge_back(model, strategy=strategy, calibration=DATA, budget=plan, progress=False)
    assert stored_bytes(merged) == plan.n_bytes < largest.n_bytes


@pytest.mark.parametrize(
    "adapter",
    [
        LoHaConfig(r=4, target_modules=["q_proj", "down_proj"], init_weights=False),
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]),
        LoraConfig(r=4, target_modules="all-linear", layer_replication=[[0, 2], [1, 2]]),
    ],
    ids=["loha", "ia3", "dora", "modules_to_save", "layer_replication"],
)
def test_other_adapters_and_layers_without_one_keep_their_bits(adapter):
    model = adapted(adapter=adapter)
    plan = plan_merge_bits(model, DATA, average=5.5, strategy="requantize", progress=False)
    base = {name: layer.spec for name, layer in quantized_layers(model.get_base_model()).items()}
    merged, report = pql.merge_back(model, budget=plan, progress=False)
    now = {name: layer.spec for name, layer in quantized_layers(merged).items()}
    assert len(report.layers) == len(plan.layers)
    assert all(spec == base[name] for name, spec in now.items() if name not in plan.layers and name in base)
    assert len({now[name].nbits for name in plan.layers}) > 1
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in merged.state_dict().values()}
    assert sum(tensor.nbytes for tensor in held.values()) == plan.model_bytes


@pytest.mark.parametrize("name", ["t5", "qwen2-vl"])
def test_other_models(name):
    model = adapted_other(name)
    data = Calibration(data=MODELS[name].batches(), n_tokens=320, sequence_length=40)
    plan = plan_merge_bits(model, data, average=4.9, progress=False)
    merged, _ = pql.merge_back(model, strategy="calibrated", calibration=data, budget=plan, progress=False)
    planned = {name: layer for name, layer in quantized_layers(merged).items() if name in plan.layers}
    assert sum(t.nbytes for each in planned.values() for t in each.quantized_weight.tensors.values()) == plan.n_bytes


def test_what_makes_no_sense_is_refused_by_name_and_nothing_is_changed():
    model = adapted()
    before, plan = tensors(model), plan_at_5()
    for strategy in ("append", "exact", "aware", "keep", "dense"):
        with pytest.raises(ValueError, match=f"budget= chooses other bits.*strategy={strategy!r}"):
            pql.merge_back(model, strategy=strategy, budget=plan, progress=False)
    few = copy.deepcopy(plan)
    few.layers["lm_head"], few.chosen["lm_head"] = few.layers[next(iter(few.layers))], 0
    other = copy.deepcopy(plan)
    first = next(iter(other.layers))
    other.layers[first] = [
        type(c)(fields={"num_codebooks": 2}, n_bytes=c.n_bytes, kl=c.kl) for c in other.layers[first]
    ]
    for budget, error, message in (
        (3.5, ValueError, "needs calibration data"),
        ([3], TypeError, "budget must be"),
        (few, ValueError, "names 'lm_head', which is no quantized linear layer"),
        (other, ValueError, "'num_codebooks'.*made for another method"),
    ):
        with pytest.raises(error, match=message):
            pql.merge_back(model, budget=budget, progress=False)
    with pytest.raises(ValueError, match="cannot be met"):
        pql.merge_back(model, budget=1.0, calibration=DATA, progress=False)
    with pytest.raises(TypeError, match="needs one budget"):
        plan_merge_bits(model, DATA, progress=False)
    with pytest.raises(ValueError, match="strategy"):
        plan_merge_bits(model, DATA, average=4.0, strategy="append", progress=False)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"are merged already.*unmerge_adapter"):
        pql.merge_back(model, budget=plan, progress=False)
    model.unmerge_adapter()
    after = tensors(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_plan_for_layers_without_an_adapter_is_refused_where_it_would_change_them():
    plan = plan_at_5()
    model = adapted(adapter=LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="it has no adapter to merge"):
        pql.merge_back(model, budget=plan, progress=False)


def test_adapters_trained_for_their_bits_are_refused_by_auto_and_merged_where_asked():
    qalora = LoraConfig(r=4, target_modules="all-linear", use_qalora=True, qalora_group_size=16)
    model = adapted(adapter=qalora)
    with pytest.raises(ValueError, match=r"\['default'\] are QA-LoRA"):
        pql.merge_back(model, budget=5.0, calibration=DATA, progress=False)
    _, report = pql.merge_back(model, strategy="requantize", budget=4.5, calibration=DATA, progress=False)
    assert len({round(layer.bits_after) for layer in report.layers}) > 1
    aware = adapted()
    pql.enable_merge_aware(aware)
    with pytest.raises(ValueError, match="trained through the rounding of these very bits"):
        pql.merge_back(aware, budget=5.0, calibration=DATA, progress=False)
    scales = get_peft_model(
        pql.quantize_model(tiny_model(), CONFIG, progress=False), pql.QuantScalesConfig(target_modules="all-linear")
    )
    with pytest.raises(ValueError, match="tuned scales merge exactly"):
        pql.merge_back(scales, budget=5.0, calibration=DATA, progress=False)


def test_tuning_and_measuring_go_with_a_budget():
    model = adapted()
    data = Calibration(data=IDS, n_tokens=160, sequence_length=40, learning_rate=3e-3)
    merged, report = pql.merge_back(
        model, strategy="calibrated", calibration=data, budget=5.0, tune_epochs=1, evaluate_on=IDS[0], progress=False
    )
    assert report.capture is not None
    assert len({layer.spec.nbits for layer in quantized_layers(merged).values()}) > 1


def test_experts_keep_their_bits_beside_planned_layers():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2)
    base = pql.quantize_model(MixtralForCausalLM(config).eval(), CONFIG, progress=False)
    lora = LoraConfig(
        r=2,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    model = get_peft_model(base, lora).eval()
    plan = plan_merge_bits(model, DATA, average=4.5, strategy="requantize", progress=False)
    assert {name.rpartition(".")[2] for name in plan.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    merged, _ = pql.merge_back(model, budget=plan, progress=False)
    held = {tensor.untyped_storage().data_ptr(): tensor for tensor in merged.state_dict().values()}
    assert sum(tensor.nbytes for tensor in held.values()) == plan.model_bytes
    widths = {name: layer.spec.nbits for name, layer in quantized_layers(merged).items()}
    assert {width for name, width in widths.items() if "experts" in name} == {3}
    assert len({width for name, width in widths.items() if "self_attn" in name}) > 1
