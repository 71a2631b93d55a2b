"""Whatever holds quantized layers saves what its loader reads, or refuses to be saved."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig

from .tiny import tiny_model, token_ids

CONFIG = HQQConfig(nbits=4, group_size=32)


class OwnSaver(nn.Module):
    """Saves and loads in its own way, as diffusers' models and the hub's mixin do."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 32)
        self.config = {"width": 64}

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        torch.save(self.state_dict(), folder / "weights.pt")


class Wrapper(nn.Module):
    """Keeps a transformers model, as sentence-transformers and value heads do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model()

    def save_pretrained(self, folder: Path) -> None:
        self.inner.save_pretrained(folder)


def small_unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    sizes = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    blocks = {"down_block_types": down, "up_block_types": up, "cross_attention_dim": 32, "attention_head_dim": 8}
    return diffusers.UNet2DConditionModel(**sizes, **blocks, in_channels=4, out_channels=4).eval()


def small_transformer() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1, "sample_size": 8, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(**sizes, in_channels=4, out_channels=4, num_embeds_ada_norm=8).eval()


MODELS = {"own saver": OwnSaver, "UNet": small_unet, "DiT": small_transformer}


@pytest.mark.parametrize("how", ["as it is", "copied", "pickled", "inside another module"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_whose_loader_knows_no_quantized_layers_refuses_to_be_saved(name, how, tmp_path):
    model = MODELS[name]()
    pql.quantize_model(nn.Sequential(model) if how == "inside another module" else model, CONFIG, progress=False)
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    with pytest.raises(NotImplementedError, match=r"is quantized.*random numbers.*load_state_dict.*dequantize_model"):
        model.save_pretrained(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="transformers models"):
        pql.save_model(model, tmp_path / "model")


@pytest.mark.parametrize("name", MODELS)
def test_the_ways_out_of_the_refusal_work(name, tmp_path):
    model = pql.quantize_model(MODELS[name](), CONFIG, progress=False)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = MODELS[name]()
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.add_(0.01)
    pql.quantize_model(again, CONFIG, progress=False)
    again.load_state_dict(torch.load(file, weights_only=True))
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())

    pql.dequantize_model(model)
    model.save_pretrained(tmp_path / "dense")
    if hasattr(type(model), "from_pretrained"):
        loaded, state = type(model).from_pretrained(tmp_path / "dense"), model.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_a_transformers_model_inside_another_module_saves_as_a_quantized_one(tmp_path):
    wrapper = pql.quantize_model(Wrapper(), CONFIG, progress=False)
    wrapper.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert pql.quantized_modules(loaded).keys() == pql.quantized_modules(wrapper.inner).keys()
    with torch.no_grad():
        assert torch.equal(loaded(token_ids()).logits, wrapper.inner(token_ids()).logits)
    assert pql.verify_model(tmp_path) == []
