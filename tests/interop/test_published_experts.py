"""Checkpoints of mixtures as the ``hqq`` package and transformers 4 wrote them: each expert's layers by themselves."""

import json

import pytest
import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from mixtures import tiny_mixture
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql

NAMES = {
    "qwen3_moe": ("mlp.experts", ("gate_proj", "up_proj"), "down_proj", "Qwen3MoeForCausalLM"),
    "mixtral": ("block_sparse_moe.experts", ("w1", "w3"), "w2", "MixtralForCausalLM"),
}


def package_layer(weight: torch.Tensor, axis: int) -> HQQLinear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.detach().clone()
    settings = BaseQuantizeConfig(nbits=4, group_size=16, axis=axis)
    return HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", initialize=True)


def write(folder, family: str, *, axis: int = 1) -> dict[str, torch.Tensor]:
    """The folder, and the dense weight of each stack as the package computes it."""
    folder.mkdir()
    model = tiny_mixture(family)
    inside, (gate, up), down, architecture = NAMES[family]
    entries, expected = {}, {}
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            entries[name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if family == "mixtral" else name] = tensor
            continue
        prefix = name.partition(".mlp.experts.")[0]
        dense = []
        for expert, weight in enumerate(tensor):
            parts = zip((gate, up), weight.chunk(2), strict=True) if "gate_up" in name else [(down, weight)]
            layers = {part: package_layer(each, axis) for part, each in parts}
            for part, layer in layers.items():
                for key, value in layer.state_dict().items():
                    entries[f"{prefix}.{inside}.{expert}.{part}.{key}"] = value
            dense.append(torch.cat([layer.dequantize() for layer in layers.values()]))
        expected[name] = torch.stack(dense)
    for name in [name for name in entries if name.endswith("self_attn.q_proj.weight")]:
        for key, value in package_layer(entries.pop(name), axis).state_dict().items():
            entries[f"{name.removesuffix('.weight')}.{key}"] = value
    config = model.config.to_diff_dict() | {
        "architectures": [architecture],
        "dtype": "float32",
        "quantization_config": {
            "quant_config": BaseQuantizeConfig(nbits=4, group_size=16, axis=axis),
            "quant_method": "hqq",
            "skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: tensor.contiguous().clone() for name, tensor in entries.items() if isinstance(tensor, torch.Tensor)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return expected


@pytest.mark.parametrize("family", sorted(NAMES))
def test_single_experts_are_read_into_stacks(family, tmp_path, capfd):
    expected = write(tmp_path / "published", family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "published").eval()
    said = capfd.readouterr().err
    assert "UNEXPECTED" not in said
    assert "MISSING" not in said
    stacks = pql.quantized_stacks(model)
    assert set(stacks) == set(expected)
    for name, dense in expected.items():
        torch.testing.assert_close(stacks[name].dequantize(), dense, atol=1e-6, rtol=1e-5)
    ids = torch.arange(3, 20)[None]
    logits = model(ids).logits
    pql.save_model(model, tmp_path / "ours")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(loaded(ids).logits, logits)


def test_groups_over_the_rows_of_gate_and_up_are_refused(tmp_path):
    write(tmp_path / "published", "qwen3_moe", axis=0)
    with pytest.raises(ValueError, match=r"experts\.0\.gate_proj: .*cannot lie in one"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "published")


def test_a_missing_expert_is_named(tmp_path):
    write(tmp_path / "published", "qwen3_moe")
    file = tmp_path / "published" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if ".0.mlp.experts.2.up_proj." not in name}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"holds 4, 3 quantized layers .* of model\.layers\.0\.mlp\.experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "published")
