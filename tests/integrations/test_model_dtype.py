"""The dtype of a model is that of its weights, not that of a scale that happens to come first."""

import json

import pytest
import torch
from _tiny_models import tiny_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import peft_quantlayers as pql

CONFIG = pql.HQQConfig(group_size=16, iters=1)


class LinearFirstConfig(PreTrainedConfig):
    model_type = "linear_first"


class LinearFirst(PreTrainedModel):
    """Its first floating parameter is a linear layer's."""

    config_class = LinearFirstConfig

    def __init__(self, config: LinearFirstConfig) -> None:
        super().__init__(config)
        self.project = nn.Linear(64, 64, bias=False)
        self.norm = nn.LayerNorm(64)
        self.classifier = nn.Linear(64, 64)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.norm(self.project(x.to(self.dtype))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_a_model_that_begins_with_a_linear_layer_keeps_its_dtype(dtype, tmp_path):
    torch.manual_seed(0)
    model = LinearFirst(LinearFirstConfig()).to(dtype)
    pql.quantize_model(model, CONFIG, progress=False)
    assert model.dtype == dtype
    pql.save_model(model, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = LinearFirst.from_pretrained(tmp_path / "model")
    assert loaded.dtype == loaded.norm.weight.dtype == dtype
    x = torch.randn(2, 64)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("class_name", ["Siglip2VisionModel", "Llama4VisionModel", "LlamaForCausalLM"])
def test_the_dtype_is_that_of_the_float_model(class_name):
    model = tiny_model(class_name).bfloat16()
    expected = {name: m.dtype for name, m in model.named_modules() if isinstance(m, PreTrainedModel)}
    pql.quantize_model(model, CONFIG, progress=False)
    assert {name: m.dtype for name, m in model.named_modules() if isinstance(m, PreTrainedModel)} == expected


def test_transformers_has_its_own_again_after_unregistering():
    own = PreTrainedModel.dtype
    pql.unregister()
    try:
        assert PreTrainedModel.dtype is not own
        assert tiny_model("LlamaForCausalLM").half().dtype == torch.float16
    finally:
        pql.register()
