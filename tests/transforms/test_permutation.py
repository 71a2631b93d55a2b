"""Permutations leave what a model computes as it is, and put channels of similar size into one group."""

import peft
import pytest
import torch
from calibration.other_models import MODELS as MODELS_OF_OTHER_KINDS
from calibration.other_models import other_model
from every_method import methods_for, quick_config
from tiny_models import MODELS, change, logits, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.calibration.model_calls import model_calls
from peft_quantlayers.transforms.free_channels import find_free_channels

DATA = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(7))
STREAM_REFUSED = {"gemma2", "gemma3", "olmo2"}
TIED = {"llama tied", "gpt2", "opt", "cohere", "falcon"}


@pytest.mark.parametrize("name", MODELS)
def test_a_permutation_leaves_what_the_model_computes(name):
    model = tiny_model(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    pql.transform_model(model, pql.Permutation(residual=False), progress=False)
    assert change(logits(model), before) < 1e-5 if name in STREAM_REFUSED | {"falcon"} else 1e-12
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
    assert any(part in key for key in moved for part in ("mlp", "fc", "dense_4h", "experts"))
    for key in moved:  # the same numbers in another order
        assert torch.equal(model.state_dict()[key].flatten().sort().values, weights[key].flatten().sort().values)
    assert model.config.quantlayers_transforms == [
        {"transform": "permutation", "by": "weights", "mlp": True, "heads": True, "residual": False}
    ]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in STREAM_REFUSED])
def test_the_residual_stream_is_reordered_with_its_embeddings_and_norms_and_a_head_stays_tied(name):
    model = tiny_model(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    transform = pql.Permutation(mlp=False, heads=False)
    pql.transform_model(model, transform, progress=False)
    assert change(logits(model), before) < 1e-6
    assert sum(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()) > 8
    for key, value in model.state_dict().items():
        assert torch.equal(value.flatten().sort().values, weights[key].flatten().sort().values)
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embeddings.weight) == (name in TIED)
    assert model.config.tie_word_embeddings == (name in TIED)


@pytest.mark.parametrize("name", sorted(STREAM_REFUSED))
def test_a_stream_that_norms_write_to_is_refused_by_name_and_nothing_is_changed(name):
    model = tiny_model(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"residual stream of {type(model).__name__}"):
        pql.transform_model(model, pql.Permutation(), progress=False)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not hasattr(model.config, "quantlayers_transforms")


def places(name: str) -> dict[str, list[str]]:
    model = tiny_model(name)
    call = model_calls(model, [DATA[:2]])[0]
    found = find_free_channels(model, call)
    return {place.reader: [source for source, _ in place.sources] for place in found if ".0." in place.reader}


def test_the_places_are_those_of_the_architecture():
    prefix = "model.layers.0"
    assert places("llama") == {f"{prefix}.mlp.down_proj": [f"{prefix}.mlp.gate_proj", f"{prefix}.mlp.up_proj"]}
    assert places("phi3") == {f"{prefix}.mlp.down_proj": [f"{prefix}.mlp.gate_up_proj"]}
    assert places("gpt2") == {"transformer.h.0.mlp.c_proj": ["transformer.h.0.mlp.c_fc"]}
    assert places("qwen3_moe") == {f"{prefix}.mlp.experts.down_proj": [f"{prefix}.mlp.experts.gate_up_proj"]}
    assert set(places("qwen2_moe")) == {
        f"{prefix}.mlp.experts.down_proj",
        f"{prefix}.mlp.shared_expert.down_proj",
    }


@pytest.mark.parametrize("by", ["inputs", "weights", "both"])
def test_channels_come_in_the_order_of_their_size(by):
    model = tiny_model("llama", torch.float32)
    pql.transform_model(model, pql.Permutation(by=by), calibration=DATA, progress=False)
    layer, seen = model.model.layers[1].mlp.down_proj, []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=DATA)
    inputs, weights = seen[0].abs().mean(0), layer.weight.square().mean(0).sqrt()
    sizes = {"inputs": inputs, "weights": weights, "both": inputs * weights}[by]
    order = torch.argsort(sizes, descending=True).float()
    if by == "weights":
        assert order.tolist() == sorted(order.tolist())
    # The data is read in windows of another length, so that inputs differ a little.
    assert torch.corrcoef(torch.stack([order, torch.arange(len(order)).float()]))[0, 1] > 0.9


def test_a_reordered_model_has_a_lower_error_where_channels_differ_in_size():
    def error(transforms) -> float:
        model = tiny_model("llama", torch.float32)
        with torch.no_grad():  # each second hidden channel is small
            model.model.layers[0].mlp.down_proj.weight[:, ::2] /= 50
        before = logits(model)
        config = pql.HQQConfig(nbits=3, group_size=8, skip_modules=["self_attn", "gate_proj", "up_proj", "layers.1"])
        pql.quantize_model(model, config, transforms=transforms, progress=False)
        return change(logits(model), before)

    assert error([pql.Permutation(residual=False)]) < 0.95 * error(None)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_half_precision_models_are_reordered_too(name):
    model = tiny_model(name, torch.bfloat16)
    before = logits(model)
    pql.transform_model(model, pql.Permutation(by="weights"), progress=False)
    assert change(logits(model), before) < 0.03


@pytest.mark.parametrize("method", methods_for("calibrated"))
def test_it_goes_with_quantizing_lora_merging_saving_and_loading(method, tmp_path):
    model, config = tiny_model("llama", torch.float32), quick_config(method)
    pql.quantize_model(model, config, transforms=pql.Permutation(by="both"), calibration=DATA, progress=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    merged, _ = pql.merge_back(adapted.eval(), progress=False)
    pql.save_model(merged, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(merged))
    assert [each["transform"] for each in loaded.config.quantlayers_transforms] == ["permutation"]


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_other_kinds_of_models(name):
    model, data = other_model(name), MODELS_OF_OTHER_KINDS[name].batches()
    with torch.no_grad():
        before = model(**data[0]).logits
    pql.transform_model(model, pql.Permutation(by="inputs", residual=False), calibration=data, progress=False)
    with torch.no_grad():
        assert change(model(**data[0]).logits, before) < 1e-4
    with pytest.raises(ValueError, match=f"residual stream of {type(model).__name__}"):
        pql.transform_model(model, pql.Permutation(), calibration=data, progress=False)


def test_what_has_no_free_channels_and_what_reorders_nothing_is_refused():
    class Norms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.norm, self.down_proj = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.norm(self.up_proj(x)).cumsum(-1)
            return self.down_proj(weight)

    with pytest.raises(ValueError, match=r"Norms has no channels whose order is free.*not changed"):
        pql.transform_model(
            Norms(), pql.Permutation(residual=False), calibration=[torch.randn(4, 8, 16)], progress=False
        )
    with pytest.raises(ValueError, match="reorders nothing"):
        pql.Permutation(mlp=False, heads=False, residual=False)
    with pytest.raises(ValueError, match="by"):
        pql.Permutation(by="size")
    with pytest.raises(ValueError, match="Permutation measures inputs: give calibration="):
        pql.transform_model(tiny_model("llama"), pql.Permutation(by="both"))
