"""Rotations leave what a model computes as it is, in every family that allows them, and are refused elsewhere."""

import logging

import pytest
import torch
import transformers as hf
from calibration.other_models import MODELS as MODELS_OF_OTHER_KINDS
from calibration.other_models import other_model
from tiny_models import GROUPED, MODELS, change, logits, tiny_model
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers.transforms.rotation_core import hadamard, random_orthogonal, rotation_matrix

NOT_ROTATABLE = {  # and the norm whose gain is in the way
    "gemma2": "post_attention_layernorm",
    "gemma3": "post_attention_layernorm",
    "olmo2": "q_norm",
}
TIED = {"llama tied", "gpt2", "opt", "cohere", "falcon"}


def keep_float64(monkeypatch) -> None:
    """Norm layers and routers that cast float64 to float32 leave it as it is."""
    to, softmax = torch.Tensor.to, nn.functional.softmax

    def wide(tensor, *args, **kwargs):
        is_narrowing = tensor.dtype == torch.float64 and args[:1] == (torch.float32,)
        return tensor if is_narrowing else to(tensor, *args, **kwargs)

    def wide_softmax(tensor, *args, dtype=None, **kwargs):
        return softmax(tensor, *args, dtype=None if tensor.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(nn.functional, "softmax", wide_softmax)


@pytest.fixture
def float64_norms(monkeypatch):
    keep_float64(monkeypatch)


@pytest.mark.parametrize("size", [1, 2, 4, 12, 20, 24, 28, 36, 40, 60, 64, 108, 140, 144, 576])
def test_hadamard_matrices_have_entries_of_one_size_and_orthogonal_rows(size):
    matrix = hadamard(size)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.t(), size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [0, 3, 6, 35, 92])
def test_a_size_without_a_known_hadamard_matrix_gives_none(size):
    assert hadamard(size) is None


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("use_hadamard", [False, True])
@pytest.mark.parametrize("size", [32, 35, 36])
def test_rotations_are_orthogonal_and_keep_the_mean_where_asked(size, use_hadamard, keeps_mean):
    matrix = rotation_matrix(size, use_hadamard=use_hadamard, keeps_mean=keeps_mean, seed=5)
    assert change(matrix @ matrix.t(), torch.eye(size, dtype=torch.float64)) < 1e-14
    ones = torch.ones(size, dtype=torch.float64)
    assert (change(matrix @ ones, ones) < 1e-13) == keeps_mean
    assert not torch.equal(matrix, rotation_matrix(size, use_hadamard=use_hadamard, keeps_mean=keeps_mean, seed=6))
    assert float(matrix.abs().max()) < 0.95  # no channel stays as it was


@pytest.mark.parametrize("size", [32, 36, 64, 576])
def test_inputs_of_one_sign_are_spread_too(size):
    """A column of a Hadamard matrix has one sign: without signs of the inputs their sum would be one outlier."""
    matrix = rotation_matrix(size, use_hadamard=True, keeps_mean=False, seed=5)
    assert float((torch.ones(size, dtype=torch.float64) @ matrix).abs().max()) < 5  # a sum of them has size ** 0.5


def test_a_random_orthogonal_matrix_may_have_either_determinant():
    signs = {round(float(torch.det(random_orthogonal(3, torch.Generator().manual_seed(seed))))) for seed in range(12)}
    assert signs == {-1, 1}


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, "hadamard") for name in MODELS if name not in NOT_ROTATABLE] + [("llama", "random"), ("gpt2", "random")],
)
def test_a_rotation_leaves_what_the_model_computes(name, kind, float64_norms):
    model = tiny_model(name)
    before, weights = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
    pql.transform_model(model, pql.Rotation(kind=kind))
    assert change(logits(model), before) < 1e-12
    matrices = {key: value for key, value in model.state_dict().items() if value.dim() > 1}
    assert all(change(value, weights[key]) > 0.1 for key, value in matrices.items())
    assert model.config.quantlayers_transforms == [
        {"transform": "rotation", "kind": kind, "residual": True, "heads": True, "seed": 0}
    ]


@pytest.mark.parametrize("name", NOT_ROTATABLE)
def test_a_model_whose_norms_write_to_the_stream_is_refused_by_name(name):
    model = tiny_model(name)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be rotated: .*{NOT_ROTATABLE[name]}"):
        pql.transform_model(model, pql.Rotation())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert not hasattr(model.config, "quantlayers_transforms")


def test_sinusoids_that_are_added_to_the_stream_are_seen_although_most_of_their_channels_are_nearly_constant():
    sizes = {"vocab_size": 96, "d_model": 64, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    model = hf.XGLMForCausalLM(hf.XGLMConfig(**sizes, max_position_embeddings=64, pad_token_id=0)).eval()
    before = logits(model)
    with pytest.raises(ValueError, match="XGLMForCausalLM cannot be rotated: something other"):
        pql.transform_model(model, pql.Rotation())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", NOT_ROTATABLE)
def test_the_heads_of_such_a_model_can_be_rotated(name, float64_norms):
    model = tiny_model(name)
    before, weight = logits(model), model.model.layers[0].self_attn.v_proj.weight.clone()
    pql.transform_model(model, pql.Rotation(residual=False))
    assert change(logits(model), before) < 1e-12
    assert change(model.model.layers[0].self_attn.v_proj.weight, weight) > 0.1


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "qwen3_moe"])
def test_half_precision_models_are_rotated_too(name):
    model = tiny_model(name, torch.bfloat16)
    before = logits(model)
    pql.transform_model(model, pql.Rotation())
    assert change(logits(model), before) < 0.03


@pytest.mark.parametrize("name", sorted(TIED))
def test_a_head_that_shares_the_embeddings_is_untied_said_so_and_saved_with_the_model(name, tmp_path, caplog):
    model = tiny_model(name, torch.float32)
    before = logits(model)
    with caplog.at_level(logging.WARNING):
        pql.transform_model(model, pql.Rotation())
    assert "no longer shares its weight" in caplog.text
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))
    assert change(logits(loaded), before) < 1e-5
    assert loaded.config.quantlayers_transforms == model.config.quantlayers_transforms


def test_a_refused_rotation_leaves_the_head_tied():
    torch.manual_seed(0)
    model = hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GROUPED, head_dim=16, tie_word_embeddings=True)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.rand_like(parameter) * 0.1)
    with pytest.raises(ValueError, match="cannot be rotated"):
        pql.transform_model(model, pql.Rotation())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True


def test_an_attention_with_a_gate_for_each_channel_keeps_its_basis():
    model = tiny_model("llama")
    for layer in model.model.layers:
        attention, gate = layer.self_attn, (torch.rand(32) + 0.5).double()
        attention.o_proj.register_forward_pre_hook(lambda module, args, gate=gate: (args[0] * gate,))
    before, value = logits(model), model.model.layers[0].self_attn.v_proj.weight.clone()
    with pytest.raises(ValueError, match="no attention whose values could be rotated"):
        pql.transform_model(model, pql.Rotation(residual=False))
    assert torch.equal(logits(model), before)
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, value)


def test_a_tower_that_writes_to_the_stream_and_that_no_data_reached_is_refused_by_name():
    model = other_model("qwen2-vl")
    with pytest.raises(
        ValueError, match=r"model.visual.* may write to it, and the data does not reach it; give calib"
    ):
        pql.transform_model(model, pql.Rotation())


@pytest.mark.parametrize(
    ("name", "reason"), [("bert", "reads the residual"), ("vit", "embeddings"), ("t5", "more than one place")]
)
def test_other_kinds_of_models_are_refused_by_name(name, reason):
    model, data = other_model(name), MODELS_OF_OTHER_KINDS[name].batches()
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot be rotated: .*{reason}"):
        pql.transform_model(model, pql.Rotation(), calibration=data)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_options_that_rotate_nothing_are_refused():
    with pytest.raises(ValueError, match="rotates nothing"):
        pql.Rotation(residual=False, heads=False)
    with pytest.raises(ValueError, match="kind"):
        pql.Rotation(kind="givens")


def test_what_is_no_float_model_is_refused_with_the_way_out():
    model = tiny_model("llama", torch.float32)
    pql.quantize_model(model, pql.HQQConfig(nbits=4, group_size=8), progress=False)
    with pytest.raises(ValueError, match=r"quantized already.*transforms="):
        pql.transform_model(model, pql.Rotation())
    with pytest.raises(TypeError, match="transforms must be a list"):
        pql.transform_model(tiny_model("llama"), [])
