"""What a summary says: every parameter once, the specs, the reasons of the rules that select, and the bytes."""

import copy

import pytest
import torch
from every_method import all_methods, quick_config
from integrations.tiny import tiny_model
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, PhimoeConfig, PhimoeForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, HQQSpec, quantize_model, quantized_modules, summary
from peft_quantlayers.report.model_summary import ModelSummary

CONFIG = HQQConfig(nbits=4)


def reasons(found: ModelSummary) -> dict[str, str]:
    return {module.name: module.reason for module in found.dense}


def facts(found: ModelSummary) -> list[tuple]:
    return [(module.name, module.spec, module.n_parameters, module.nbytes) for module in found.modules]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "falcon", "bert"])
def test_every_parameter_counts_once_in_a_float_model_and_in_a_quantized_one(family):
    model = tiny_model(family)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    before = summary(model)
    assert before.n_parameters == n_parameters
    assert before.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert before.fraction_quantized == 0
    after = summary(quantize_model(model, CONFIG, progress=False))
    assert after.n_parameters == n_parameters
    assert after.nbytes == sum(parameter.nbytes for parameter in model.parameters())
    assert [module.name for module in after.quantized] == list(quantized_modules(model))
    assert [module.spec for module in after.quantized] == [layer.spec for layer in quantized_modules(model).values()]


@all_methods
def test_what_a_config_would_make_is_what_it_makes(method):
    model, config = tiny_model(), quick_config(method, skip_modules=["layers.0.mlp"])
    before = copy.deepcopy(model.state_dict())
    planned = summary(model, config)
    assert planned.is_planned
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not quantized_modules(model)
    made = summary(quantize_model(model, config, progress=False))
    assert facts(planned) == facts(made)
    assert reasons(planned)["model.layers.0.mlp.up_proj"] == "skip_modules"
    assert reasons(made)["model.layers.0.mlp.up_proj"] == "left dense by the config"


def test_a_loaded_model_has_the_summary_of_the_one_that_was_saved(tmp_path):
    model = quantize_model(tiny_model(), CONFIG, progress=False)
    pql.save_model(model, tmp_path / "model")
    assert summary(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) == summary(model)


def test_reasons_say_why_a_module_is_dense():
    model = tiny_model("llama-tied")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    first.mlp.up_proj = nn.Linear(64, 127)
    first.mlp.down_proj = nn.Linear(127, 64)
    planned = summary(model, HQQConfig(skip_modules=["o_proj"]))
    made = summary(quantize_model(model, HQQConfig(skip_modules=["o_proj"]), progress=False))
    expected = {
        "model.embed_tokens": "embedding",
        "lm_head": "output head",
        "model.norm": "norms, biases and scalars",
        "model.layers.0.self_attn.q_proj": "weight shared with another module",
        "model.layers.1.self_attn.q_proj": "weight shared with another module",
        "model.layers.0.mlp.down_proj": "shape does not fit",
    }
    assert expected.items() <= reasons(planned).items()
    assert expected.items() <= reasons(made).items()
    assert reasons(planned)["model.layers.0.self_attn.o_proj"] == "skip_modules"
    assert reasons(made)["model.layers.0.self_attn.o_proj"] == "left dense by the config"
    for found in (planned, made):
        details = {module.name: module.detail for module in found.dense}
        assert details["model.layers.0.mlp.down_proj"] == "in_features=127 is not a multiple of group_size=64"
        assert details["lm_head"] == "shares a tensor with model.embed_tokens"


def test_a_float_model_is_not_quantized_and_says_so():
    found = reasons(summary(tiny_model()))
    assert found["model.layers.0.mlp.up_proj"] == "not quantized"
    assert found["lm_head"] == "output head"


EXPERTS = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
}


def test_fused_experts_are_named_with_their_bytes():
    model = MixtralForCausalLM(MixtralConfig(**EXPERTS))
    config = HQQConfig(nbits=4, skip_modules=["experts"])
    found = summary(quantize_model(model, config, progress=False))
    (group,) = [group for group in found.by_reason if group.label == "fused experts"]
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert group.nbytes == sum(p.nbytes for p in experts)
    assert group.n_parameters == sum(p.numel() for p in experts)


@pytest.mark.parametrize("create", [MixtralForCausalLM, PhimoeForCausalLM])
def test_routers_are_named_whatever_their_type(create):
    model = create(create.config_class(**EXPERTS))
    (name,) = [name for name, _ in model.named_modules() if name.endswith(("mlp.gate", "mlp.router"))]
    assert reasons(summary(model))[name] == "router of experts"
    assert reasons(summary(model, CONFIG))[name] == "router of experts"


def test_a_linear_of_an_unknown_type_is_named_with_its_class():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    found = summary(quantize_model(nn.Sequential(nn.Linear(64, 64), Scaled(64, 64)), CONFIG, progress=False))
    (dense,) = found.dense
    assert (dense.reason, dense.detail) == ("unknown type of linear", "Scaled")


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj", "down_proj"]),
        LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"]),
        LoraConfig(target_modules=["q_proj", "lm_head", "embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3]),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        pql.QuantScalesConfig(target_modules="all-linear"),
    ],
    ids=["lora", "modules-to-save", "lora-on-head", "tokens", "prefix", "scales"],
)
def test_adapters_are_counted_apart_and_change_nothing_else(config):
    model = quantize_model(tiny_model(), CONFIG, progress=False)
    before = summary(model)
    base_bytes = sum(parameter.nbytes for parameter in model.parameters())
    peft_model = get_peft_model(model, config)
    found = summary(peft_model)
    assert found.modules == before.modules
    assert found.model == "LlamaForCausalLM"
    assert found.adapter_nbytes == sum(parameter.nbytes for parameter in peft_model.parameters()) - base_bytes
    assert found.adapter_parameters > 0
    assert "adapters: " in str(found)


def test_the_text_is_a_dozen_lines_and_the_table_has_one_for_each_module():
    model = tiny_model()
    overrides = {f"layers.0.{name}": {"nbits": nbits} for name, nbits in [("self_attn.q_proj", 2), ("mlp.up_proj", 8)]}
    found = summary(quantize_model(model, HQQConfig(overrides=overrides), progress=False))
    text = str(found)
    assert 6 <= len(text.splitlines()) <= 16
    assert text.startswith("LlamaForCausalLM: ")
    assert "quantized: 14 layers" in text
    assert "hqq nbits=8 group_size=64 axis=1: 1 layer, 8.50 bits per weight" in text
    assert "output head: 1 module, 32.8 kB (lm_head)" in text
    lines = found.table().splitlines()
    assert len(lines) == 1 + len(found.modules)
    assert [line.split()[0] for line in lines[1:]] == [module.name for module in found.modules]


def test_many_specs_share_a_line():
    overrides = {
        f"layers.{i}.mlp.{name}": {"nbits": n}
        for i, name, n in zip(
            [0, 0, 0, 1, 1],
            ["up_proj", "gate_proj", "down_proj", "up_proj", "gate_proj"],
            [1, 2, 3, 5, 6],
            strict=True,
        )
    }
    found = summary(tiny_model(), HQQConfig(overrides=overrides))
    assert len(found.by_spec) == 7  # 96 inputs have groups of their own
    assert "  3 more: " in str(found)
    assert sum(len(group.names) for group in found.by_spec) == len(found.quantized)


def test_every_kind_of_module_has_a_reason():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64)
            self.few = nn.Linear(64, 2)
            self.conv, self.norm = nn.Conv2d(3, 8, 2), nn.LayerNorm(8)
            self.attention = nn.MultiheadAttention(64, 4)

    found = reasons(summary(quantize_model(Mixed(), CONFIG, progress=False)))
    assert found == {
        "few": "a handful of outputs",
        "conv": "convolution",
        "norm": "norms, biases and scalars",
        "attention": "other parameters",
        "attention.out_proj": "unknown type of linear",
    }


def test_a_model_on_meta_has_a_summary():
    with torch.device("meta"):
        model = PhimoeForCausalLM(PhimoeConfig(**EXPERTS))
    assert "as the config would make it" in str(summary(model, CONFIG))


def test_groups_are_weighted_by_parameters():
    found = summary(quantize_model(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), CONFIG, progress=False))
    (group,) = found.by_spec
    assert group.spec == HQQSpec(nbits=4)
    assert group.names == ("0", "1")
    assert group.bits_per_weight == 4.5
    assert found.fraction_quantized == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("folder",), TypeError, r"summary.*AutoModelForCausalLM.from_pretrained\('folder'\)"),
        ((nn.Sequential(nn.Linear(4, 4)), "hqq"), TypeError, "config must be"),
        ((nn.Sequential(nn.Linear(4, 4)), HQQConfig(skip_modules=["x"])), ValueError, "matches no module"),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        summary(*arguments)


def test_a_config_for_a_model_with_adapters_is_refused():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        summary(model, CONFIG)
