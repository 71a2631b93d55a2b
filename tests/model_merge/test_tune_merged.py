"""Merges tuned end to end: nearer to the unmerged predictions, codes as merged, undone to the bit."""

import copy

import pytest
import torch
from every_method import quick_config
from integrations.tiny import tiny_model
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import Calibration, HQQConfig, quantized_modules

IDS = torch.randint(3, 128, (16, 40), generator=torch.Generator().manual_seed(0))
# One batch, on which the tuning is judged too: a tiny random model's scales need not carry over to others.
DATA = Calibration(data=IDS[:1].repeat(4, 1), n_tokens=160, sequence_length=160, learning_rate=3e-3)
# By hand: a method for each of two strategies.
CONFIGS = {
    "hqq": HQQConfig(nbits=2, group_size=16),
    "hqq-float32": HQQConfig(nbits=2, group_size=16, scale_dtype="float32"),
    "aqlm": quick_config("aqlm"),
}


def adapted(config: pql.QuantConfig, family: str = "llama", **lora) -> nn.Module:
    base = tiny_model(family)
    base.get_output_embeddings().weight.data.mul_(8)
    base = pql.quantize_model(base, config, progress=False)
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(**({"r": 4, "target_modules": "all-linear"} | lora)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
    return model.eval()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{layer.layer_name}.{name}": tensor.clone()
        for layer in quantized_modules(model).values()
        for name, tensor in layer.quantized_weight.tensors.items()
    }


def divergence(model: nn.Module, teacher: torch.Tensor) -> float:
    with torch.no_grad():
        ours = model(DATA.data.view(1, -1)).logits.log_softmax(-1)
    return float((teacher.exp() * (teacher - ours)).sum(-1).mean())


@pytest.mark.parametrize(("method", "strategy"), zip(CONFIGS, ("requantize", "requantize", "calibrated"), strict=True))
def test_predictions_come_nearer_codes_stay_and_unmerging_restores_the_bits(method, strategy):
    model = adapted(CONFIGS[method])
    with torch.no_grad():
        teacher = model(DATA.data.view(1, -1)).logits.log_softmax(-1)
    before = tensors(model)
    given = {"calibration": DATA} if strategy == "calibrated" else {}
    plain, _ = pql.merge_back(copy.deepcopy(model), strategy=strategy, progress=False, **given)
    merged, report = pql.merge_back(
        model, strategy=strategy, calibration=DATA, tune_epochs=10, unload=False, progress=False
    )
    assert divergence(merged, teacher) < 0.9 * divergence(plain, teacher)
    ours, theirs = tensors(merged), tensors(plain)
    names = {name.rpartition(".")[2] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert names
    assert names <= {"scale", "scales", "codebooks"}
    for layer in report.layers:  # the reports are on the tuned weights
        assert layer.strategy == strategy
    merged.unmerge_adapter()
    after = tensors(merged)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma3"])
def test_other_architectures(family):
    model = adapted(HQQConfig(nbits=2, group_size=16), family)
    with torch.no_grad():
        teacher = model(DATA.data.view(1, -1)[:, :160]).logits.log_softmax(-1)
    plain, _ = pql.merge_back(copy.deepcopy(model), strategy="requantize", progress=False)
    tuned, _ = pql.merge_back(model, calibration=DATA, tune_epochs=10, progress=False)
    assert divergence(tuned, teacher) < divergence(plain, teacher)


def test_what_cannot_be_tuned_is_refused_and_nothing_is_changed():
    model = adapted(CONFIGS["hqq"])
    before = tensors(model)
    for options, message in (
        ({"tune_epochs": 2}, "needs calibration="),
        ({"tune_epochs": 2, "calibration": DATA, "strategy": "dense"}, "rounds nothing"),
        ({"tune_epochs": 2, "calibration": DATA, "strategy": "keep"}, "rounds nothing"),
        ({"tune_epochs": -1, "calibration": DATA}, "tune_epochs"),
    ):
        with pytest.raises(ValueError, match=message):
            pql.merge_back(model, progress=False, **options)
    after = tensors(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
