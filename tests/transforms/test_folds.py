"""Folds are found in models of many families, leave the outputs as they are, and are refused elsewhere."""

import pytest
import torch
import transformers as hf
from tiny_models import MODELS, SIZES, change, logits, tiny_model, token_ids
from torch import nn

from peft_quantlayers.calibration.blocks import Call
from peft_quantlayers.calibration.model_calls import model_calls
from peft_quantlayers.transforms.find_folds import find_folds, norm_offset
from peft_quantlayers.transforms.folds import Fold, move_scale
from peft_quantlayers.transforms.recorded_reads import record_reads

IN_FLOAT32 = {"cohere"}  # whose norm layers compute in float32, whatever the model's dtype is


def folds_of(model: nn.Module) -> list[Fold]:
    return find_folds(model, model_calls(model, [token_ids()])[0])


def random_scale(fold: Fold) -> torch.Tensor:
    return torch.rand(fold.n_channels, dtype=torch.float64) * 3 + 0.2


def pairs(folds: list[Fold], block: str) -> set[tuple[str, tuple[str, ...]]]:
    """Last parts of the names in one block."""
    return {
        (fold.source.rpartition(".")[2], tuple(name.rpartition(".")[2] for name in fold.readers))
        for fold in folds
        if block in fold.source
    }


@pytest.mark.parametrize("name", MODELS)
def test_scales_move_without_a_change_of_the_outputs(name, monkeypatch):
    if name.startswith("gemma"):  # whose norms compute in float32 otherwise
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    model = tiny_model(name)
    before = logits(model)
    folds = folds_of(model)
    assert folds
    for fold in folds:
        halved = [tensor.clone() for tensor in fold.reader_tensors(model)]
        move_scale(model, fold, random_scale(fold))
        assert all(change(a, b) > 0.1 for a, b in zip(fold.reader_tensors(model), halved, strict=True))
    assert change(logits(model), before) < (1e-6 if name in IN_FLOAT32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2", "qwen3_moe"])
def test_the_same_folds_are_found_in_every_dtype_and_the_search_leaves_no_trace(name, dtype):
    model = tiny_model(name, dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    found = [(fold.source, fold.readers) for fold in folds_of(model)]
    assert found == [(fold.source, fold.readers) for fold in folds_of(tiny_model(name))]
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


QKV, MLP = ("input_layernorm", ("q_proj", "k_proj", "v_proj")), ("up_proj", ("down_proj",))
EXPECTED = {
    "llama": {QKV, ("v_proj", ("o_proj",)), ("post_attention_layernorm", ("gate_proj", "up_proj")), MLP},
    "gemma3": {QKV, ("v_proj", ("o_proj",)), ("pre_feedforward_layernorm", ("gate_proj", "up_proj")), MLP},
    "phi3": {
        ("input_layernorm", ("qkv_proj",)),
        ("qkv_proj", ("o_proj",)),
        ("post_attention_layernorm", ("gate_up_proj",)),
        ("gate_up_proj", ("down_proj",)),
    },
    "gpt2": {("ln_1", ("c_attn",)), ("c_attn", ("c_proj",)), ("ln_2", ("c_fc",))},  # a GELU before mlp.c_proj
    "qwen3_moe": {QKV, ("v_proj", ("o_proj",)), ("post_attention_layernorm", ("gate", "gate_up_proj"))},
    "cohere": {
        ("input_layernorm", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
        ("v_proj", ("o_proj",)),
        MLP,
    },
    "olmo2": {("v_proj", ("o_proj",)), MLP},  # its norms come after the layers
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_folds_of_a_block_are_those_that_its_family_has(name):
    folds = folds_of(tiny_model(name))
    assert pairs(folds, ".1.") == EXPECTED[name]


def test_heads_that_share_keys_and_values_share_their_scales():
    fold = next(fold for fold in folds_of(tiny_model("llama")) if fold.source.endswith("v_proj"))
    assert fold.n_channels == 16
    assert fold.head_dim == 8
    shared = fold.for_readers(torch.arange(16))
    assert shared.view(4, 8).tolist() == [[*range(8)], [*range(8)], [*range(8, 16)], [*range(8, 16)]]
    assert torch.equal(fold.per_channel(shared.double()), torch.arange(16).double())


def test_a_head_that_shares_its_weight_with_the_embeddings_is_no_reader():
    assert any(fold.readers == ("lm_head",) for fold in folds_of(tiny_model("llama")))
    assert not any(fold.readers == ("lm_head",) for fold in folds_of(tiny_model("llama tied")))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_what_a_norm_adds_to_its_weight_is_measured(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model(name, dtype)
        norms = record_reads(model, model_calls(model, [token_ids()])[0]).readers
        offsets = {norm_offset(model.get_submodule(norm)) for norm in norms}
        assert offsets == {1.0 if name == "gemma3" else 0.0}


class ResidualFromBehindTheNorm(nn.Module):
    """As in BERT: the sum takes the norm's output too."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(x)))


class ReadTwice(nn.Module):
    """A layer that reads another input in a later call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.fc1(self.norm(x)))
        return torch.tanh(self.fc2(self.fc1(x)))


@pytest.mark.parametrize("model_type", [ResidualFromBehindTheNorm, ReadTwice])
def test_a_model_without_a_place_for_scales_is_refused_by_name(model_type):
    torch.manual_seed(0)
    model = model_type().double()
    with pytest.raises(ValueError, match=f"{model_type.__name__} has no place.*not changed"):
        find_folds(model, Call((torch.randn(4, 16).double(),), {}))


def test_an_encoder_whose_residuals_come_from_behind_the_norms_is_refused_by_name():
    model = hf.BertModel(hf.BertConfig(**SIZES)).double().eval()
    with pytest.raises(ValueError, match="BertModel"):
        find_folds(model, model_calls(model, [token_ids()])[0])
