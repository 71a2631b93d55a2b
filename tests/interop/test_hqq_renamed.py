"""Published HQQ checkpoints of models whose modules have other names in files: read, or refused with the way out."""

import json
from pathlib import Path

import pytest
import torch
from _tiny_models import tiny_model
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq_models import package_codes
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

import peft_quantlayers as pql
from quantlayers_kernels.bitpack import unpack

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SETTINGS = BaseQuantizeConfig(nbits=4, group_size=16, axis=1)
# The name of a module in transformers 5, and in files of transformers 4.
OLD_NAMES = {
    "LlavaForConditionalGeneration": [
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ],
    "Qwen2VLForConditionalGeneration": [("model.language_model.", "model."), ("model.visual.", "visual.")],
}


def in_package_form(model: nn.Module) -> dict[str, HQQLinear]:
    """The layers of the language model as the package makes them, put into ``model``."""
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "language_model.layers" in name:
            layers[name] = HQQLinear(module, SETTINGS, compute_dtype=torch.float32, device="cpu", del_orig=False)
            model.set_submodule(name, layers[name])
    return layers


def old_name(class_name: str, name: str) -> str:
    return next((old + name.removeprefix(new) for new, old in OLD_NAMES[class_name] if name.startswith(new)), name)


def published(class_name: str, folder: Path) -> tuple[nn.Module, dict[str, HQQLinear]]:
    model = tiny_model(class_name)
    model.save_pretrained(folder)
    layers = in_package_form(model)
    skipped = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    state = {old_name(class_name, name): tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state = {name: tensor for name, tensor in state.items() if not name.endswith("lm_head.weight")}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_config": SETTINGS,
        "quant_method": "hqq",
        "skip_modules": [old_name(class_name, name) for name in skipped],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return model, layers


@pytest.mark.parametrize("class_name", OLD_NAMES)
def test_a_vision_language_model_loads_and_saves(class_name, tmp_path):
    model, layers = published(class_name, tmp_path / "published")
    assert layers
    loaded = type(model).from_pretrained(tmp_path / "published")
    found = pql.quantized_modules(loaded)
    assert found.keys() == layers.keys()
    for name, layer in found.items():
        codes = unpack(layer.W_q.data, layer.spec.nbits, layer.in_features)
        assert torch.equal(codes, package_codes(layers[name]))
        assert torch.equal(layer.dequantize(), layers[name].dequantize())
    dense = {name: p for name, p in model.state_dict().items() if name.rpartition(".")[0] not in layers}
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in dense.items())
    pql.save_model(loaded, tmp_path / "ours")
    again = type(model).from_pretrained(tmp_path / "ours")
    assert all(torch.equal(again.state_dict()[name], p) for name, p in loaded.state_dict().items())


def test_a_checkpoint_whose_only_quantized_layers_are_experts_loads(tmp_path):
    """transformers 4 kept each expert as linear layers of its own; here all others are dense."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    torch.manual_seed(0)
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)  # in the names of transformers 4
    state = load_file(tmp_path / "model.safetensors")
    for name in [name for name in state if ".experts." in name]:
        weight = state.pop(name)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight.data = weight
        layer = HQQLinear(linear, SETTINGS, compute_dtype=torch.float32, device="cpu")
        prefix = name.removesuffix("weight")
        state |= {prefix + key: tensor for key, tensor in layer.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((tmp_path / "config.json").read_text())
    skipped = ["lm_head", "gate", "q_proj", "k_proj", "v_proj", "o_proj"]
    fields["quantization_config"] = {"quant_config": SETTINGS, "quant_method": "hqq", "skip_modules": skipped}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert set(pql.quantized_stacks(loaded)) == {
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    }
    assert not pql.quantized_modules(loaded)
    for name, stack in pql.quantized_stacks(loaded).items():  # 4 bits in groups of 16
        torch.testing.assert_close(stack.dequantize(), model.get_parameter(name), atol=0.02, rtol=0)
