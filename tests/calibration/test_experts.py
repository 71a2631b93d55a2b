"""Calibration of experts: what each expert reads, the moment that a stack shares, and what too few tokens do."""

import logging
from pathlib import Path

import pytest
import torch
from every_method import methods_for, quick_config
from mixtures import MIXTURES, codes, same, tiny_mixture
from peft import LoraConfig, get_peft_model
from programs import run_program
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.calibration import Visitor, walk
from peft_quantlayers.calibration.statistics import collect
from peft_quantlayers.layers.expert_types import dense_stacks
from peft_quantlayers.layers.quantized_layers import quantized_stacks
from peft_quantlayers.methods import get_method

IDS = torch.randint(3, 128, (16, 64), generator=torch.Generator().manual_seed(3))
CONFIG = pql.HQQConfig(nbits=3, group_size=16)
# Their own loops read one expert at a time, and call no module that could be watched.
UNWATCHED = ("longcat_flash", "jetmoe")


def calibration(**fields) -> pql.Calibration:
    return pql.Calibration(**{"data": IDS, "n_tokens": IDS.numel(), "sequence_length": 64} | fields)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS[:4]).logits


@pytest.mark.parametrize("family", sorted(MIXTURES))
def test_calibrated_experts_have_a_lower_output_error(family, caplog):
    results = []
    expected = logits(tiny_mixture(family))
    plain = pql.quantize_model(tiny_mixture(family), CONFIG, progress=False)
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        model = pql.quantize_model(
            tiny_mixture(family), CONFIG, calibration=calibration(), on_layer=results.append, progress=False
        )
    names = list(quantized_stacks(model))
    assert names == list(quantized_stacks(plain))
    assert {result.name for result in results} >= set(names)
    measured = {result.name: result.output_error for result in results if result.name in names}
    if family in UNWATCHED:
        assert set(measured.values()) == {None}
        assert "get no inputs from the calibration data" in caplog.text
        return
    assert all(0 < error < 0.1 for error in measured.values())
    assert "get no inputs" not in caplog.text
    assert (logits(model) - expected).norm() < 0.97 * (logits(plain) - expected).norm()
    assert not list(dense_stacks(model))


def inputs_of_experts(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the experts module of the first layer reads, and which experts."""
    seen = []
    experts = model.model.layers[0].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        for batch in IDS.split(4):
            model(batch)
    handle.remove()
    return torch.cat([x for x, _ in seen]), torch.cat([index for _, index in seen])


def test_the_stack_shares_the_moment_of_its_tokens_and_each_down_projection_has_its_own():
    config = pql.HQQConfig(nbits=3, group_size=16, skip_modules=["self_attn"])
    given = calibration()
    model = pql.quantize_model(tiny_mixture("qwen3_moe"), config, calibration=given, progress=False)
    first = quantized_stacks(model)["model.layers.0.mlp.experts.gate_up_proj"]
    second = quantized_stacks(model)["model.layers.0.mlp.experts.down_proj"]
    float_model = tiny_mixture("qwen3_moe")
    experts = float_model.model.layers[0].mlp.experts
    x, index = inputs_of_experts(float_model)
    method, options = get_method("hqq"), {"damping": given.damping, "shrinkage": given.used_shrinkage}
    shared = collect([x], ("second_moment",)).hessian(**options)
    for expert in range(4):
        wanted = method.quantize(experts.gate_up_proj[expert], first.spec, hessian=shared)
        difference = method.dequantize(wanted) - first.dequantize_expert(expert)
        assert difference.norm() < 1e-3 * method.dequantize(wanted).norm()
        tokens = x[(index == expert).any(1)]
        gate, up = (tokens @ first.dequantize_expert(expert).t()).chunk(2, dim=-1)
        own = collect([nn.functional.silu(gate) * up], ("second_moment",)).hessian(**options)
        wanted = method.quantize(experts.down_proj[expert], second.spec, hessian=own)
        difference = method.dequantize(wanted) - second.dequantize_expert(expert)
        assert difference.norm() < 1e-3 * method.dequantize(wanted).norm()


def starved() -> nn.Module:
    """Expert 3 of the first layer is never chosen."""
    model = tiny_mixture("qwen3_moe")

    def choose_others(module, args, output):
        return (*output[:2], output[2].clamp(max=2))

    model.model.layers[0].mlp.gate.register_forward_hook(choose_others)
    return model


def test_an_expert_without_tokens_is_named_and_takes_the_moment_of_the_stack(caplog):
    model = starved()
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        pql.quantize_model(model, CONFIG, calibration=calibration(), progress=False)
    assert "saw fewer tokens of the calibration data than they have inputs" in caplog.text
    assert "model.layers.0.mlp.experts.down_proj: 3." in caplog.text
    for stack in quantized_stacks(model).values():
        assert torch.isfinite(stack.dequantize()).all()
        assert stack.dequantize_expert(3).any()


class Seen(Visitor):
    statistics = ("second_moment",)

    def __init__(self) -> None:
        self.groups = {}

    def visit_group(self, group) -> None:
        self.groups[group.names[0]] = group


def test_padding_does_not_count():
    padded, mask = torch.cat([IDS, torch.zeros_like(IDS)], dim=1), torch.ones(16, 128, dtype=torch.long)
    mask[:, 64:] = 0
    batches = [{"input_ids": a, "attention_mask": b} for a, b in zip(padded.split(4), mask.split(4), strict=True)]
    model = tiny_mixture("qwen3_moe")
    names = [name for name, _, _ in dense_stacks(model)]
    with_padding, without = Seen(), Seen()
    for given, visitor in ((pql.Calibration(data=batches), with_padding), (calibration(), without)):
        walk(model, names, given, visitor, progress=False)
    assert set(with_padding.groups) == set(names)
    for name, group in with_padding.groups.items():
        other = without.groups[name]
        assert group.statistics.n_tokens == other.statistics.n_tokens == 2 * IDS.numel()
        assert group.experts.n_tokens == other.experts.n_tokens
        torch.testing.assert_close(group.statistics.second_moment, other.statistics.second_moment)
        for expert, parts in group.experts.rows.items():
            torch.testing.assert_close(torch.cat(parts), torch.cat(other.experts.rows[expert]))
    assert [bool(group.experts.rows) for group in without.groups.values()] == [False, True, False, True]


@pytest.mark.parametrize("method", methods_for("calibrated"))
def test_every_method_is_calibrated(method):
    config = quick_config(method)
    expected = logits(tiny_mixture("gpt_oss"))
    plain = pql.quantize_model(tiny_mixture("gpt_oss"), config, progress=False)
    model = pql.quantize_model(tiny_mixture("gpt_oss"), config, calibration=calibration(), progress=False)
    assert (logits(model) - expected).norm() < (logits(plain) - expected).norm()


def test_an_interrupted_run_continues_from_its_folder_with_the_same_result(tmp_path):
    wanted = pql.quantize_model(tiny_mixture("gpt_oss"), CONFIG, calibration=calibration(), progress=False)
    model, done = tiny_mixture("gpt_oss"), []

    def stop(result):
        done.append(result)
        if result.name.startswith("model.layers.1.") and "experts" in result.name:
            raise KeyboardInterrupt

    given = calibration(resume_folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        pql.quantize_model(model, CONFIG, calibration=given, on_layer=stop, progress=False)
    left = [name for name, _, _ in dense_stacks(model)]
    assert left == ["model.layers.1.mlp.experts.down_proj"]
    assert isinstance(model.get_parameter(left[0]), nn.Parameter)
    assert torch.isfinite(logits(model)).all()
    resumed = pql.quantize_model(tiny_mixture("gpt_oss"), CONFIG, calibration=given, progress=False)
    assert same(codes(resumed), codes(wanted))
    assert torch.equal(logits(resumed), logits(wanted))


def test_the_users_choice_of_an_implementation_is_kept():
    model = tiny_mixture("qwen3_moe")
    model.set_experts_implementation("eager")
    pql.quantize_model(model, CONFIG, calibration=calibration(), progress=False)
    assert model.config._experts_implementation == "eager"
    other = pql.quantize_model(tiny_mixture("qwen3_moe"), CONFIG, calibration=calibration(), progress=False)
    assert other.config._experts_implementation == "quantlayers"
    assert same(codes(model), codes(other))


def test_finetuned_blocks_leave_experts_as_they_were_quantized():
    model = pql.quantize_model(
        tiny_mixture("qwen3_moe"), CONFIG, calibration=calibration(finetune_epochs=1), progress=False
    )
    assert len(quantized_stacks(model)) == 4
    assert torch.isfinite(logits(model)).all()


def adapted(family: str, config) -> nn.Module:
    model = pql.quantize_model(tiny_mixture(family), config, progress=False)
    config = LoraConfig(
        target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=4, lora_alpha=8
    )
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * 0.05)
    return peft_model.eval()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_a_calibrated_merge_retains_the_adapter_and_is_undone_to_the_bit(family):
    peft_model = adapted(family, CONFIG)
    before, expected = codes(peft_model), logits(peft_model)
    merged, report = pql.merge_back(
        peft_model, strategy="calibrated", calibration=calibration(), unload=False, progress=False
    )
    stacks = [layer for layer in report.layers if "experts" in layer.name]
    assert len(stacks) == 4
    assert all(layer.strategy == "calibrated" and layer.output_retained > 0.8 for layer in stacks)
    calibrated = (logits(merged) - expected).norm()
    merged.unmerge_adapter()
    assert same(codes(peft_model), before)
    assert torch.equal(logits(peft_model), expected)
    plain, _ = pql.merge_back(peft_model, strategy="requantize", progress=False)
    assert calibrated < (logits(plain) - expected).norm()


def test_append_holds_the_delta_in_one_more_codebook_of_each_expert():
    config = pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=6, in_group_size=4, rounds=1, beam=2)
    peft_model = adapted("qwen3_moe", config)
    expected = logits(peft_model)
    for given in (None, calibration()):
        merged, _ = pql.merge_back(peft_model, strategy="append", calibration=given, unload=False, progress=False)
        assert {stack.spec.num_codebooks for stack in quantized_stacks(merged).values()} == {2}
        assert (logits(merged) - expected).norm() < 0.5 * expected.norm()
        merged.unmerge_adapter()
    assert torch.equal(logits(peft_model), expected)


# A warning of torch's C++ code is given to the handler that the thread points to.
WARNS_AFTER_CALIBRATION = """
import sys
import torch
import peft_quantlayers as pql
from mixtures import tiny_mixture
from quantlayers_kernels.hqq.op import hqq_linear

ids = torch.randint(3, 128, (16, 64))
given = pql.Calibration(data=ids, n_tokens=ids.numel(), sequence_length=64)
pql.quantize_model(tiny_mixture(sys.argv[1]), pql.HQQConfig(nbits=3), calibration=given, progress=False)
weight = (torch.zeros(8, 8, dtype=torch.uint8), torch.ones(8, 1), torch.zeros(8, 1), None, 8, 1)
torch.func.vmap(lambda x: hqq_linear(x, *weight))(torch.ones(2, 1, 8))
print("done")
"""


def test_no_pointer_into_a_waiting_pass_is_left_in_torch():
    done = run_program("-c", WARNS_AFTER_CALIBRATION, "llama4", cwd=Path(__file__).parents[1])
    assert done.stdout == "done\n", done.stderr
    assert "batching rule for quantlayers::hqq_linear" in done.stderr
