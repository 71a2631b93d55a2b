"""Mixtures of experts of every family: quantized in memory and while loading, saved, loaded, generated with."""

import copy
import json
import logging

import pytest
import torch
from every_method import all_methods, quick_config
from mixtures import MIXTURES, tiny_mixture
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.layers.expert_types import dense_stacks
from peft_quantlayers.layers.quantized_layers import quantized_layers, quantized_stacks

IDS = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(3))
CONFIG = pql.HQQConfig(nbits=4, group_size=16)


def quantized(family: str, config=CONFIG, dtype=torch.float32):
    return pql.quantize_model(tiny_mixture(family, dtype), config, progress=False)


def load(folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=kwargs.pop("dtype", torch.float32), **kwargs).eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(model, other):
    first, second = state(model), state(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_nearly_all_linear_weights_are_quantized(family):
    model = tiny_mixture(family)
    names = [name for name, _, _ in dense_stacks(model)]
    plan = pql.summary(model, CONFIG)
    pql.quantize_model(model, CONFIG, progress=False)
    assert list(quantized_stacks(model)) == names
    found = pql.summary(model)
    quantized_size = sum(m.n_parameters for m in found.modules if m.spec is not None)
    dense = [m for m in found.modules if m.spec is None and m.reason not in ("embedding", "output head")]
    assert quantized_size / (quantized_size + sum(m.n_parameters for m in dense if "router" not in m.reason)) > 0.95
    planned = {m.name: (m.spec, m.nbytes, m.n_parameters) for m in plan.modules if m.spec is not None}
    assert planned == {m.name: (m.spec, m.nbytes, m.n_parameters) for m in found.modules if m.spec is not None}
    assert {m.name for m in found.modules} >= set(names)


@pytest.mark.parametrize("family", sorted(MIXTURES))
@pytest.mark.parametrize("original", [True, False])
def test_saved_and_loaded_and_quantized_while_loading_are_the_same(family, original, tmp_path):
    tiny_mixture(family).save_pretrained(tmp_path / "float", save_original_format=original)
    model = quantized(family)
    on_the_fly = load(tmp_path / "float", quantization_config=CONFIG)
    assert_same(on_the_fly, model)
    logits = model(IDS).logits
    torch.testing.assert_close(on_the_fly(IDS).logits, logits, atol=1e-6, rtol=1e-6)
    for name, each in (("memory", model), ("fly", on_the_fly)):
        pql.save_model(each, tmp_path / name, save_original_format=original)
        assert pql.verify_model(tmp_path / name) == []
        loaded = load(tmp_path / name)
        assert_same(loaded, model)
        torch.testing.assert_close(loaded(IDS).logits, logits, atol=1e-6, rtol=1e-6)
    fields = json.loads((tmp_path / "memory" / "config.json").read_text())["quantization_config"]
    assert fields["format_version"] == 5
    assert set(fields["stacks"]) == set(quantized_stacks(model))
    generated = loaded.generate(IDS[:, :5], max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False))


@all_methods
def test_every_method_saves_and_loads_experts(method, tmp_path):
    config = quick_config(method)
    tiny_mixture("gpt_oss").save_pretrained(tmp_path / "float")
    model = quantized("gpt_oss", config)
    assert_same(load(tmp_path / "float", quantization_config=config), model)
    pql.save_model(model, tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)


def test_half_precision_saves_and_loads(tmp_path):
    model = quantized("qwen3_moe", dtype=torch.bfloat16)
    pql.save_model(model, tmp_path)
    loaded = load(tmp_path, dtype="auto")
    assert {stack.dtype for stack in quantized_stacks(loaded).values()} == {torch.bfloat16}
    assert_same(loaded, model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=0.02, rtol=0.02)


def test_a_large_codebook_has_codes_of_two_bytes(tmp_path):
    config = pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=9, in_group_size=4, rounds=0, beam=1)
    model = quantized("qwen3_moe", config)
    pql.save_model(model, tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        keys = [key for key in opened.keys() if key.endswith("experts.gate_up_proj.codes")]  # noqa: SIM118
        assert opened.get_tensor(keys[0]).dtype == torch.int16
    assert_same(load(tmp_path), model)


def test_overrides_and_skips_go_by_the_name_of_the_parameter(tmp_path):
    config = pql.HQQConfig(
        nbits=4,
        group_size=16,
        overrides={"experts.*": {"nbits": 2}, "layers.1.*.down_proj": {"nbits": 8}},
        skip_modules=["layers.0.mlp.experts.down_proj"],
    )
    model = quantized("qwen3_moe", config)
    found = {name.removeprefix("model."): stack.spec.nbits for name, stack in quantized_stacks(model).items()}
    assert found == {
        "layers.0.mlp.experts.gate_up_proj": 2,
        "layers.1.mlp.experts.gate_up_proj": 2,
        "layers.1.mlp.experts.down_proj": 8,
    }
    reasons = {m.name: m.reason for m in pql.summary(model).modules}
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "fused experts"
    pql.save_model(model, tmp_path)
    loaded = load(tmp_path)
    assert_same(loaded, model)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_skip_modules_leaves_all_experts_dense_and_says_nothing(caplog):
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        model = quantized("qwen3_moe", pql.HQQConfig(nbits=4, group_size=16, skip_modules=["experts"]))
    assert not quantized_stacks(model)
    assert not caplog.records
    assert model.config._experts_implementation == "grouped_mm"


def test_only_experts_can_be_quantized(tmp_path):
    config = pql.HQQConfig(nbits=4, group_size=16, skip_modules=["self_attn"])
    model = quantized("qwen3_moe", config)
    assert len(quantized_layers(model)) == len(quantized_stacks(model)) == 4
    pql.save_model(model, tmp_path)
    assert_same(load(tmp_path), model)
    pql.prepare_model_for_kbit_training(model)


def test_shapes_that_do_not_fit_are_fitted_left_or_refused(caplog):
    for on_misfit, expected in (("shrink", 4), ("dense", 2)):
        caplog.clear()
        config = pql.HQQConfig(nbits=4, group_size=64, on_misfit=on_misfit)
        with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
            model = quantized("qwen3_moe", config)
        assert len(quantized_stacks(model)) == expected
        assert "experts.down_proj" in caplog.text
        model(IDS)
    model = tiny_mixture("qwen3_moe")
    with pytest.raises(ValueError, match=r"experts\.down_proj: in_features=32 is not a multiple of group_size=64"):
        pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=64, on_misfit="refuse"), progress=False)
    assert not quantized_layers(model)


def test_an_interrupted_run_is_continued_and_other_specs_are_refused():
    model = tiny_mixture("qwen3_moe")
    pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=16, skip_modules=["down_proj"]), progress=False)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: the layer is quantized already"):
        pql.quantize_model(model, pql.HQQConfig(nbits=2, group_size=16), progress=False)
    pql.quantize_model(model, CONFIG, progress=False)
    assert_same(model, quantized("qwen3_moe"))


def test_broken_experts_are_refused_before_anything_changes():
    model = tiny_mixture("qwen3_moe")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = torch.nan
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.down_proj.*NaN or Inf"):
        pql.quantize_model(model, CONFIG, progress=False)
    assert state(model).keys() == before.keys()


def test_the_card_counts_experts(tmp_path):
    pql.save_model(quantized("qwen3_moe"), tmp_path)
    assert "8 linear layers, 4 stacks of experts with 16 matrices, " in (tmp_path / "README.md").read_text()


def test_dequantized_experts_compute_the_same_and_are_plain_again(tmp_path):
    model = quantized("gpt_oss")
    logits = model(IDS).logits
    dense = copy.deepcopy(model)
    dense.dequantize()
    assert (model.config._experts_implementation, dense.config._experts_implementation) == (
        "quantlayers",
        "grouped_mm",
    )
    assert list(dense.state_dict()) == list(tiny_mixture("gpt_oss").state_dict())
    torch.testing.assert_close(dense(IDS).logits, logits, atol=1e-5, rtol=1e-5)
    dense.save_pretrained(tmp_path)
    torch.testing.assert_close(load(tmp_path)(IDS).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda fields: fields["stacks"].update({"x": 0}), "x"),
        (lambda fields: fields.update(stacks=[]), "'stacks' must be a mapping"),
        (lambda fields: fields["stacks"].update({"model.layers.0.mlp.experts.down_proj": 9}), "not an index"),
        (
            lambda fields: fields["modules"].update({"model.layers.0.mlp.experts.down_proj": 0}),
            "in several of 'modules', 'stacks'",
        ),
        (lambda fields: fields.update(format_version=4), "unknown field"),
        (
            lambda fields: fields["modules"].update(
                {"model.layers.0.mlp.experts.down_proj": fields["stacks"].pop("model.layers.0.mlp.experts.down_proj")}
            ),
            "describes a linear layer, and the model has a stack of experts",
        ),
        (lambda fields: fields["stacks"].pop("model.layers.0.mlp.experts.down_proj"), "codes"),
    ],
)
def test_a_config_that_does_not_fit_the_experts_is_refused(change, said, tmp_path):
    pql.save_model(quantized("qwen3_moe"), tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    change(fields["quantization_config"])
    file.write_text(json.dumps(fields))
    with pytest.raises((ValueError, TypeError), match=said):
        load(tmp_path)


def test_experts_of_another_number_are_refused(tmp_path):
    pql.save_model(quantized("qwen3_moe"), tmp_path)
    file = tmp_path / "config.json"
    fields = json.loads(file.read_text())
    for name in ("num_experts", "num_local_experts"):
        if name in fields:
            fields[name] = 8
    file.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="of shape"):
        load(tmp_path)


def test_one_flipped_bit_in_an_expert_is_found(tmp_path):
    pql.save_model(quantized("qwen3_moe"), tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        tensor = opened.get_tensor("model.layers.0.mlp.experts.gate_up_proj.W_q")
    data = bytearray(file.read_bytes())
    at = bytes(data).find(tensor.numpy().tobytes())
    data[at + 5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"gate_up_proj\.W_q"):
        load(tmp_path)


def test_models_without_experts_are_written_as_before(tmp_path):
    from integrations.tiny import tiny_model

    model = pql.quantize_model(tiny_model(), CONFIG, progress=False)
    pql.save_model(model, tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (fields["format_version"], "stacks" in fields) == (4, False)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_from_files_to_files_gives_the_same_experts(family, tmp_path):
    tiny_mixture(family).save_pretrained(tmp_path / "float")
    pql.quantize_checkpoint(tmp_path / "float", tmp_path / "quantized", CONFIG, progress=False)
    assert pql.verify_model(tmp_path / "quantized") == []
    assert_same(load(tmp_path / "quantized"), quantized(family))


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_experts_of_a_checkpoint_are_joined_one_at_a_time(family, tmp_path, monkeypatch):
    from transformers.core_model_loading import MergeModulelist

    tiny_mixture(family).save_pretrained(tmp_path)
    seen, own = [], MergeModulelist.convert

    def convert(self, input_dict, *args, **kwargs):
        seen.extend(len(tensors) for tensors in input_dict.values())
        return own(self, input_dict, *args, **kwargs)

    monkeypatch.setattr(MergeModulelist, "convert", convert)
    model = load(tmp_path, quantization_config=CONFIG)
    assert quantized_stacks(model)
    assert set(seen) == {1}
