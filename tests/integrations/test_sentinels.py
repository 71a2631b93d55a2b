"""A saved model is never loaded as random numbers: without our import transformers stops, with it all is as before."""

import copy
import dataclasses
import json
import os

import pytest
import torch
from _tiny_models import tiny_model
from mixtures import MIXTURES, codes, same, tiny_mixture
from programs import run_program
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.checkpoint import SENTINEL_SHAPE

from .tiny import saved_tiny_model
from .tiny import tiny_model as tiny_family

# Plain, Conv1D, an own linear class, tied, renamed in files, fused experts, several weights in one tensor of the file,
# encoder-decoders, several modalities, no language model at all.
CLASSES = (
    "LlamaForCausalLM", "GPT2LMHeadModel", "FalconForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM",
    "Qwen3MoeForCausalLM", "HrmTextForCausalLM", "Step3p7ForConditionalGeneration", "T5ForConditionalGeneration",
    "WhisperForConditionalGeneration", "LlavaForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration", "VisionEncoderDecoderModel", "BertForSequenceClassification",
)  # fmt: skip
CONFIG = pql.HQQConfig(nbits=4, group_size=16)

# Prints what stock transformers makes of each folder: the error, or nothing where it loads.
STOCK = """
import json, sys
import transformers
transformers.logging.set_verbosity_error()
found = {}
for folder in sys.argv[1:]:
    name = folder.rpartition("/")[2]
    for model_type in (getattr(transformers, name.partition("-")[0]), transformers.AutoModel):
        try:
            model_type.from_pretrained(folder)
            found[f"{name} {model_type.__name__}"] = ""
        except Exception as error:
            found[f"{name} {model_type.__name__}"] = f"{type(error).__name__}: {error}"
assert ("peft_quantlayers" in sys.modules) == False
print(json.dumps(found))
"""


def in_stock_transformers(*folders):
    without_ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = run_program("-c", STOCK, *folders, env=without_ours, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stock_transformers_stops_at_a_saved_model_of_any_architecture(tmp_path):
    for name in CLASSES:
        model = pql.quantize_model(tiny_model(name), CONFIG, progress=False)
        pql.save_model(model, tmp_path / name)
    model = pql.quantize_model(tiny_model("LlamaForCausalLM"), CONFIG, progress=False)
    model.save_pretrained(tmp_path / "LlamaForCausalLM-sharded", max_shard_size="50KB")
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path / "LlamaForCausalLM-float")
    for family in MIXTURES:
        model = with_experts_alone(tiny_mixture(family))
        pql.save_model(model, tmp_path / f"{type(model).__name__}-experts")
    found = in_stock_transformers(*sorted(tmp_path.iterdir()))
    is_float = {name: name.startswith("LlamaForCausalLM-float") for name in found}
    assert sum(is_float.values()) == 2
    assert {name: bool(error) for name, error in found.items()} == {name: not is_float[name] for name in found}
    # An AutoModel that does not know the class is no test of ours.
    others = [error for name, error in found.items() if error and "Unrecognized configuration" not in error]
    assert len(others) >= 2 * (len(CLASSES) + len(MIXTURES)) - 4
    assert all("mismatch" in error for error in others), others


def with_experts_alone(model):
    """``model`` with nothing quantized but its experts."""
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return pql.quantize_model(model, dataclasses.replace(CONFIG, skip_modules=tuple(linears)), progress=False)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "longcat_flash"])
def test_our_loader_takes_experts_that_alone_are_quantized(family, tmp_path):
    model = with_experts_alone(tiny_mixture(family))
    assert not pql.quantized_modules(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.shape == SENTINEL_SHAPE for tensor in stored.values()) == 4
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] | info["missing_keys"]
    assert same(codes(loaded), codes(model))
    assert pql.verify_model(tmp_path) == []


def test_the_file_of_quantized_experts_is_a_state_dict_too(tmp_path):
    model = with_experts_alone(tiny_mixture("qwen3_moe"))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    other = copy.deepcopy(with_experts_alone(tiny_mixture("qwen3_moe")))
    other.model.layers[0].mlp.experts.gate_up_proj.write_expert(1, torch.zeros(64, 64))
    other.load_state_dict(stored)  # strict: as a Trainer resumes
    assert same(codes(other), codes(model))
    stored["model.layers.0.mlp.experts.gate_up_proj"] = torch.zeros(4, 64, 64)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(stored)


def test_each_layer_has_one_and_our_loader_says_nothing_of_them(tmp_path):
    model = pql.quantize_model(tiny_family(), CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    names = {f"{name}.weight" for name in pql.quantized_modules(model)}
    stored = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.shape == SENTINEL_SHAPE} == names
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 4
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert not names & loaded.state_dict().keys()
    assert pql.verify_model(tmp_path) == []


def test_a_headless_model_and_a_head_on_a_headless_one_find_nothing_unexpected_among_them(tmp_path):
    pql.quantize_model(tiny_family(), CONFIG, progress=False).save_pretrained(tmp_path / "head")
    body, info = AutoModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert info["unexpected_keys"] == {"lm_head.weight"}
    body.save_pretrained(tmp_path / "body")
    _, info = LlamaForCausalLM.from_pretrained(tmp_path / "body", output_loading_info=True)
    assert not info["unexpected_keys"]


def test_the_published_aqlm_layout_has_none(tmp_path):
    config = pql.AQLMConfig(num_codebooks=1, nbits_per_codebook=3, in_group_size=8)
    pql.save_model(pql.quantize_model(tiny_family(), config, progress=False), tmp_path / "model")
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as opened:
        assert not [key for key in opened.keys() if key.endswith("_proj.weight")]  # noqa: SIM118


def without_sentinels(folder, *, keep_field):
    """The folder as an older version wrote it, or with the sentinels lost on the way."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    tensors = {name: tensor for name, tensor in load_file(file).items() if tensor.shape != SENTINEL_SHAPE}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(config_file.read_text())
    if not keep_field:
        del config["quantization_config"]["sentinels"]
        config["quantization_config"]["format_version"] = 1
    config_file.write_text(json.dumps(config))


@pytest.mark.parametrize("keep_field", [True, False], ids=["lost", "older"])
def test_a_folder_without_them_loads(keep_field, tmp_path):
    model = pql.quantize_model(tiny_family(), CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    without_sentinels(tmp_path, keep_field=keep_field)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_where_the_config_does_not_announce_them_such_a_tensor_is_refused(tmp_path):
    pql.quantize_model(tiny_family(), CONFIG, progress=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["sentinels"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected tensor .*\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_file_is_a_state_dict_of_the_quantized_model(tmp_path):
    model = pql.quantize_model(tiny_family(), CONFIG, progress=False)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    other = pql.quantize_model(tiny_family(), CONFIG, progress=False)
    other.model.layers[0].mlp.up_proj.weight = torch.zeros(96, 64)
    other.load_state_dict(stored)  # strict: as a Trainer resumes
    assert torch.equal(other.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    stored["model.layers.0.mlp.up_proj.weight"] = torch.zeros(96, 64)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        other.load_state_dict(stored)


def test_a_model_that_was_loaded_on_the_fly_saves_them_too(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved_tiny_model(tmp_path / "float"), quantization_config=CONFIG)
    model.save_pretrained(tmp_path / "saved")
    assert "model.layers.0.mlp.up_proj.weight" in load_file(tmp_path / "saved" / "model.safetensors")
