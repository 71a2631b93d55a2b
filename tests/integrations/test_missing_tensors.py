"""What a checkpoint lacks, has twice, or has as numbers that no model has: an error with the file's name, not numbers
at random."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import peft_quantlayers as pql
from peft_quantlayers import AQLMConfig, HQQConfig
from peft_quantlayers.layers import LowRankBranch

from .tiny import tiny_model

CONFIGS = {  # By hand: a method for each of two formats.
    "own": HQQConfig(nbits=4, group_size=32),
    "published": AQLMConfig(num_codebooks=1, nbits_per_codebook=3),
}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(params=CONFIGS)
def folder(request, tmp_path):
    pql.quantize_model(tiny_model(), CONFIGS[request.param], progress=False).save_pretrained(tmp_path)
    return tmp_path


def edited(folder, edit):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})  # without the checksums that would find all of this


def without_layer(tensors):
    for key in [key for key in tensors if key.startswith(LAYER)]:
        del tensors[key]


def as_integers(name):
    return lambda tensors: tensors.update({name: tensors[name].to(torch.int32)})


def with_number(name, number):
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(number)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (without_layer, LAYER),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), r"lacks 1.*model\.embed_tokens\.weight"),
        (lambda tensors: tensors.pop("lm_head.weight"), r"lacks 1.*lm_head\.weight"),
        (lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"), r"lacks 1.*input_layernorm"),
        (with_number("model.norm.weight", float("nan")), r"model\.norm\.weight holds NaN"),
        (with_number("model.layers.0.self_attn.q_proj.bias", float("inf")), r"q_proj\.bias holds NaN or Inf"),
        (as_integers("model.embed_tokens.weight"), r"embed_tokens\.weight' is I32"),
        (as_integers("model.layers.0.self_attn.q_proj.bias"), r"q_proj\.bias' is I32"),
    ],
    ids=["layer", "embeddings", "head", "norm", "NaN", "Inf", "integer embeddings", "integer bias"],
)
def test_it_is_refused_with_the_name_of_the_file(edit, match, folder):
    edited(folder, edit)
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{match}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_branch_of_integers_is_refused(tmp_path):
    model = pql.quantize_model(tiny_model(), CONFIGS["own"], progress=False)
    layer = model.get_submodule(LAYER)
    layer.add_branch(LowRankBranch(torch.randn(2, layer.in_features), torch.randn(layer.out_features, 2)))
    model.save_pretrained(tmp_path)
    edited(tmp_path, as_integers(f"{LAYER}.branch.B"))
    with pytest.raises(ValueError, match=rf"model\.safetensors.*{LAYER}\.branch\.B' is I32"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_one_name_in_two_shards_is_refused_with_both(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    folder = folder / "sharded"
    model.save_pretrained(folder, max_shard_size="20KB")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=rf"{second.name} and {first.name}.*{name}|{first.name} and {second.name}.*{name}"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_two_names_of_one_tensor_are_refused(folder):
    def twice(tensors):
        tensors |= {key.removeprefix("model."): t.clone() for key, t in tensors.items() if key.startswith(LAYER)}

    edited(folder, twice)
    with pytest.raises(ValueError, match=r"the same as|two quantized layers"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_head_of_another_task_may_be_missing(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert model.score.weight.shape == (3, 64)
    assert len(pql.quantized_modules(model)) == len(pql.quantized_modules(AutoModel.from_pretrained(folder)))
    edited(folder, lambda tensors: tensors.pop("model.layers.0.input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"lacks 1.*input_layernorm"):
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
