"""SmoothQuant moves outliers of the inputs into the weights, and changes nothing else."""

import pytest
import torch
from tiny_models import change, logits, tiny_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.transforms.smoothquant import smoothing_scale

DATA = torch.randint(3, 90, (40, 20), generator=torch.Generator().manual_seed(7))


def test_the_scale_is_that_of_the_paper_and_one_for_channels_of_zeros():
    scale = smoothing_scale(torch.tensor([4.0, 9.0, 0.0, 2.0]), torch.tensor([1.0, 4.0, 1.0, 0.0]), 0.5)
    assert scale.tolist() == [2.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "qwen3", "mistral", "qwen3_moe"])
def test_a_smoothed_model_computes_what_it_did(name):
    model = tiny_model(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    pql.transform_model(model, pql.SmoothQuant(), calibration=DATA, progress=False)
    assert change(logits(model), before) < (1e-6 if name == "gemma3" else 1e-9)
    assert sum(not torch.equal(value, weights[key]) for key, value in model.state_dict().items()) >= 8
    assert model.config.quantlayers_transforms == [{"transform": "smoothquant", "alpha": 0.8}]


def largest_inputs(model: nn.Module) -> torch.Tensor:
    found = []
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0].detach().flatten(0, 1)))
    logits(model)
    handle.remove()
    return found[0].abs().amax(0)


def test_outliers_become_smaller_the_larger_alpha_is():
    spread = []
    for alpha in (0.0, 0.5, 1.0):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[5] *= 50
        pql.transform_model(model, pql.SmoothQuant(alpha=alpha), calibration=DATA, progress=False)
        largest = largest_inputs(model)
        spread.append(float(largest[5] / largest.median()))
    assert spread[0] > 10 * spread[2]
    assert spread[0] > spread[1] > spread[2]


def test_without_a_norm_that_linear_layers_alone_read_it_is_refused_by_name():
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up_proj, self.down_proj, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x + self.down_proj(torch.relu(self.up_proj(x))))

    data = [torch.randn(4, 64, 16)]
    with pytest.raises(ValueError, match=r"PostNorm has no place for the scales of SmoothQuant.*not changed"):
        pql.transform_model(PostNorm(), pql.SmoothQuant(), calibration=data, progress=False)


def test_alpha_is_a_fraction():
    with pytest.raises(ValueError, match="alpha"):
        pql.SmoothQuant(alpha=1.5)
