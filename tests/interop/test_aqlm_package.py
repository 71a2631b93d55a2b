"""AQLM models, both ways: published checkpoints load here, and ours run in the stock ``aqlm`` package."""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, AQLMLinear
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
SCHEMES = {
    "2x8": {"num_codebooks": 2, "nbits_per_codebook": 8},
    "1x16": {"num_codebooks": 1, "nbits_per_codebook": 16},
}

# The stock stack, in a process of its own: aqlm compiles and keeps state, and has a data race on two threads.
STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
assert "peft_quantlayers" not in sys.modules
ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer).__module__.startswith("aqlm"), type(layer)
    assert type(model.lm_head) is torch.nn.Linear, type(model.lm_head)
    model.save_pretrained(f"{folder}/stock")  # before the first product, for which aqlm turns the codes round in place
    with torch.no_grad():
        torch.save(model(ids).logits, f"{folder}/logits.pt")
"""


def token_ids() -> torch.Tensor:
    return torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def float_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@functools.cache
def _quantized(scheme: str) -> LlamaForCausalLM:
    fields = SCHEMES[scheme]
    return pql.quantize_model(float_model(), AQLMConfig(**fields, rounds=1, scale_dtype="float32"), progress=False)


def quantized_model(scheme: str) -> LlamaForCausalLM:
    """A copy: quantizing takes seconds."""
    return copy.deepcopy(_quantized(scheme))


def model_with_a_widened_layer(dtype: torch.dtype) -> LlamaForCausalLM:
    """One layer's weights are too small for scales in float16."""
    model = float_model().to(dtype)
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = (weight.float() * 1e-6).to(dtype)
    return pql.quantize_model(model, AQLMConfig(rounds=1), progress=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[LlamaForCausalLM, Path]]:
    """Models and the folders they were saved in."""
    models = {scheme: quantized_model(scheme) for scheme in SCHEMES}
    models["widened"] = model_with_a_widened_layer(torch.float32)
    folders = {name: tmp_path_factory.mktemp(name) for name in models}
    for name, model in models.items():
        model.save_pretrained(folders[name])
    return {name: (model, folders[name]) for name, model in models.items()}


@pytest.fixture(scope="module")
def ran_in_stock(saved) -> None:
    """In each folder: ``logits.pt``, and the model as the stock package saves it in ``stock``."""
    pytest.importorskip("aqlm", reason="the peer is not installed")
    environment = os.environ | {"NUMBA_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folders = [str(folder) for _, folder in saved.values()]
    subprocess.run([sys.executable, "-c", STOCK, *folders], check=True, env=environment)


@pytest.mark.parametrize("name", [*SCHEMES, "widened"])
def test_a_model_saved_here_gives_the_same_logits_in_the_stock_package(name, saved, ran_in_stock):
    model, folder = saved[name]
    torch.testing.assert_close(torch.load(folder / "logits.pt"), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_the_stock_package_saved_loads_again(scheme, saved, ran_in_stock):
    model, folder = saved[scheme]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "aqlm"
    assert {"lm_head", "lm_head.weight"} <= set(config["linear_weights_not_to_quantize"])
    back = AutoModelForCausalLM.from_pretrained(folder / "stock")
    assert set(pql.quantized_modules(back)) == set(pql.quantized_modules(model))
    assert torch.equal(logits(back), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_layer_widened_among_others_is_in_the_stock_layout_where_the_models_dtype_can_hold_it(dtype, tmp_path):
    model = model_with_a_widened_layer(dtype)
    widths = [layer.spec.scale_dtype for layer in pql.quantized_modules(model).values()]
    assert sorted(widths) == 13 * ["float16"] + ["float32"]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert [layer.spec.scale_dtype for layer in pql.quantized_modules(loaded).values()] == widths
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    method = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"]
    assert method == ("aqlm" if dtype == torch.float32 else "quantlayers")


@pytest.mark.parametrize("heads", [["lm_head.weight"], ["lm_head"], []], ids=["published", "module", "none"])
def test_a_published_checkpoint_loads_with_its_head_and_the_reference_weights(heads, tmp_path):
    model = quantized_model("2x8")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["linear_weights_not_to_quantize"] = ["model.embed_tokens.weight", *heads]
    path.write_text(json.dumps(config))

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.lm_head) is nn.Linear
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(logits(loaded), logits(model))
    layer = loaded.model.layers[1].mlp.down_proj
    assert type(layer) is AQLMLinear
    torch.testing.assert_close(
        layer.dequantize(torch.float32), dequantize_aqlm_reference(*(t.data for t in layer._tensors().values()))
    )


def test_saving_and_loading_is_bit_exact_and_the_same_config_again(tmp_path):
    model = quantized_model("2x8")
    model.save_pretrained(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one["quantization_config"] == two["quantization_config"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_quantizing_while_loading_equals_quantizing_in_memory(tmp_path):
    float_model().save_pretrained(tmp_path)
    config = AQLMConfig(nbits_per_codebook=6, rounds=1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(logits(loaded), logits(pql.quantize_model(float_model(), config, progress=False)))


def test_lora_trains_merges_and_unmerges_bit_for_bit_on_aqlm_layers():
    base = quantized_model("2x8")
    codes = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True)
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    adapted = logits(model)
    model.merge_adapter()
    assert not torch.equal(logits(model), adapted)
    model.unmerge_adapter()
    assert torch.equal(logits(model), adapted)
    for name, tensor in model.unload().state_dict().items():
        assert torch.equal(tensor, codes[name])


def test_a_mixed_model_of_both_methods_is_written_in_our_own_layout(tmp_path):
    model = quantized_model("2x8")
    config = pql.HQQConfig(group_size=32, skip_modules=["layers.*"], quantize_lm_head=True)
    pql.quantize_model(model, config, progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "quantlayers"
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda c: c.pop("num_codebooks"), "num_codebooks"),
        (lambda c: c.update(num_codebooks=3), r"codebooks.*\(3, 256, 1, 8\)"),
        (lambda c: c.update(nbits_per_codebook=40), "nbits_per_codebook"),
        (lambda c: c.update(in_group_size=-8), "in_group_size"),
    ],
)
def test_a_hostile_config_is_refused(edit, match, tmp_path):
    quantized_model("2x8").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)


LAYER = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("part", ["codes", "codebooks", "scales"])
def test_a_checkpoint_that_lacks_a_tensor_of_a_layer_is_refused(part, tmp_path):
    quantized_model("2x8").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{LAYER}.{part}"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 tensor.*{LAYER}\.{part}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [
        ("codebooks", torch.nan, rf"{LAYER}\.codebooks holds NaN or Inf"),
        ("scales", torch.inf, rf"{LAYER}\.scales holds NaN or Inf"),
        ("scales", 0, rf"{LAYER}\.scales holds nothing but zeros.*[Dd]ownload"),
        ("codes", 40, rf"{LAYER}\.codes holds codes from .* to 40.*[Dd]ownload"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_the_tensors_name(part, value, match, tmp_path):
    pql.quantize_model(float_model(), AQLMConfig(nbits_per_codebook=4, rounds=0), progress=False).save_pretrained(
        tmp_path
    )
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.{part}"].fill_(value)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path)
