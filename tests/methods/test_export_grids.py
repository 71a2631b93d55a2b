"""Configs for the formats of other engines: what each holds, what is refused and why, and that it is remembered."""

import json

import pytest
import torch
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig, HQQSpec
from peft_quantlayers.layers.quantize_weight import quantize_weight
from peft_quantlayers.methods import get_method
from peft_quantlayers.methods.hqq.export_grids import ALIASES, TARGETS, grid_for, held_nbits, target_name, why_not
from quantlayers_kernels.bitpack import SUPPORTED_NBITS

HELD = [(target, nbits) for target in TARGETS for nbits in held_nbits(target)]


def random_weight(out_features: int = 16, in_features: int = 256) -> torch.Tensor:
    return 0.02 * torch.randn(out_features, in_features)


@pytest.mark.parametrize(("target", "nbits"), HELD, ids=[f"{target}-{nbits}" for target, nbits in HELD])
@pytest.mark.parametrize("calibrated", [False, True], ids=["", "calibrated"])
def test_a_weight_for_a_target_lies_on_a_grid_of_it(target, nbits, calibrated):
    config = HQQConfig.for_export(target, nbits=nbits)
    spec, weight = config.spec_for("layer"), random_weight()
    hessian = torch.eye(256) + torch.rand(256, 1).mul(torch.rand(1, 256)).pow(2) if calibrated else None
    hessian = None if hessian is None else (hessian + hessian.t()) / 2 + torch.eye(256)
    quantized = get_method("hqq").quantize(weight, spec, hessian=hessian)
    assert quantized.spec == spec
    grid = grid_for(target, quantized.spec, 256)
    assert grid is not None
    assert nbits <= grid.stored_nbits
    assert grid.stored_group_size(spec.group_size) <= spec.group_size
    codes, scale = quantized.codes().float().view(*quantized.tensors["scale"].shape, -1), quantized.tensors["scale"]
    zero = {
        "symmetric": lambda: torch.full_like(scale, 2 ** (nbits - 1)),
        "integer": lambda: quantized.tensors["zero"].round().clamp(0, 2**nbits - 1),
        "float": lambda: quantized.tensors["zero"],
    }[grid.zeros if spec.zeros == "float" else spec.zeros]()
    rebuilt = (codes - zero[..., None].float()) * scale[..., None].float()
    assert torch.equal(rebuilt.view(weight.shape), get_method("hqq").dequantize(quantized))


def test_the_zero_points_are_the_most_general_kind_that_the_target_holds():
    found = {
        (target, nbits): HQQConfig.for_export(target, nbits=nbits).spec_for("layer").zeros
        for target, nbits in [("gguf", 4), ("gguf", 6), ("gguf", 8), ("awq", 4), ("vllm", 4), ("vllm", 8), ("mlx", 8)]
    }
    assert list(found.values()) == ["float", "integer", "symmetric", "integer", "integer", "symmetric", "float"]
    assert HQQConfig.for_export("gguf", symmetric=True).spec_for("layer").zeros == "symmetric"
    assert HQQConfig.for_export("awq", symmetric=True).spec_for("layer").zeros == "symmetric"


def test_gguf_has_groups_of_32_and_others_of_64_unless_one_says_otherwise():
    assert HQQConfig.for_export("gguf").group_size == 32
    assert HQQConfig.for_export("mlx").group_size == 64
    assert HQQConfig.for_export("gguf", group_size=128).group_size == 128
    assert grid_for("gguf", HQQConfig.for_export("gguf", group_size=128)).stored_group_size(128) == 32
    assert grid_for("mlx", HQQConfig.for_export("mlx", group_size=192)).stored_group_size(192) == 64


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("ggufs", "gguf"), ("vlm", "vllm"), ("compressed tensor", "compressed-tensors"), ("open-vino", "openvino")],
)
def test_an_unknown_target_is_refused_with_the_nearest_name(given, nearest):
    with pytest.raises(ValueError, match=rf"did you mean '{nearest}'"):
        HQQConfig.for_export(given)


def test_engines_and_other_spellings_name_their_format():
    assert {name: target_name(name) for name in ("GGUF", "llama.cpp", "LM Studio", "compressed_tensors")} == {
        "GGUF": "gguf",
        "llama.cpp": "gguf",
        "LM Studio": "gguf",
        "compressed_tensors": "compressed-tensors",
    }
    assert set(ALIASES.values()) <= set(TARGETS)
    with pytest.raises(TypeError, match="name such as 'gguf'"):
        HQQConfig.for_export(4)


@pytest.mark.parametrize(
    ("target", "fields", "message"),
    [
        ("awq", {"nbits": 3}, "awq does not hold 3 bits; it holds 4 bits"),
        ("mlx", {"nbits": 7}, "mlx does not hold 7 bits; it holds 1, 2, 3, 4, 5, 6 or 8 bits"),
        ("gguf", {"nbits": 8, "integer_zero": True}, "needs symmetric=True"),
        ("gptq", {"integer_zero": False}, "needs integer_zero=True"),
        ("gguf", {"group_size": 48}, "multiples of 32 weights, not of 48"),
        ("humming", {"group_size": 40}, "multiples of 16 weights, not of 40"),
        ("gguf", {"axis": 0}, "axis=1"),
        ("gguf", {"scale_dtype": "float32"}, "float16, not in float32"),
        ("gguf", {"overrides": {"down_proj": {"nbits": 8}}}, r"down_proj.*symmetric=True"),
        ("onnx", {"nbits": 8, "integer_zero": False}, "float ones at 1, 2, 3 or 4 bits"),
    ],
)
def test_what_the_target_cannot_hold_is_refused_with_what_it_can(target, fields, message):
    with pytest.raises(ValueError, match=message):
        HQQConfig.for_export(target, **fields)


def test_fields_of_other_kinds_are_refused_as_in_any_config():
    with pytest.raises(TypeError, match=r"no field.*group_size"):
        HQQConfig.for_export("gguf", groupsize=32)
    with pytest.raises(TypeError, match="nbits must be an integer"):
        HQQConfig.for_export("gguf", nbits="4")


def test_every_reason_is_given_for_every_field_and_none_without_one():
    for target, grids in TARGETS.items():
        for nbits in SUPPORTED_NBITS:
            for zeros in ({}, {"integer_zero": True}, {"symmetric": True} if nbits > 1 else {}):
                for others in ({}, {"group_size": 7}, {"group_size": None}, {"axis": 0}, {"scale_dtype": "bfloat16"}):
                    spec = HQQSpec(**{"nbits": nbits, **zeros, **others})
                    held = any(grid.holds(spec) for grid in grids)
                    assert (why_not(target, spec) == []) == held, (target, spec)
                    assert all(target in reason for reason in why_not(target, spec))


def test_layers_that_do_not_fit_get_the_largest_groups_that_the_target_holds_or_stay_dense():
    model = nn.Sequential(nn.Linear(96, 32), nn.Linear(80, 32), nn.Linear(320, 32))
    pql.quantize_model(model, HQQConfig.for_export("gguf", group_size=128), progress=False)
    assert model[0].spec.group_size == 96
    assert type(model[1]) is nn.Linear
    assert model[2].spec.group_size == 64
    whole = nn.Sequential(nn.Linear(96, 32), nn.Linear(80, 32))
    pql.quantize_model(whole, HQQConfig.for_export("mlx", group_size=None), progress=False)
    assert whole[0].spec.group_size is None
    assert type(whole[1]) is nn.Linear
    with pytest.raises(ValueError, match="multiples of 32 weights, not of 80"):
        pql.quantize_model(
            nn.Sequential(nn.Linear(80, 32)),
            HQQConfig.for_export("gguf", group_size=None, on_misfit="refuse"),
            progress=False,
        )


def test_scales_that_float16_cannot_hold_are_refused_and_not_widened():
    weight = 1e-9 * random_weight()
    spec = HQQConfig.for_export("gguf").spec_for("layer")
    with pytest.raises(ValueError, match=r"q_proj.*float16.*export_target='gguf'.*skip_modules"):
        quantize_weight(weight, spec, layer_name="q_proj")
    wide = quantize_weight(weight, HQQConfig.for_export("mlx").spec_for("layer"), layer_name="q_proj")
    assert wide.spec.scale_dtype == "float32"
    assert wide.spec.export_target == "mlx"


def test_the_target_is_saved_and_older_readers_are_told_to_upgrade():
    spec = HQQConfig.for_export("llama.cpp").spec_for("layer")
    fields = json.loads(json.dumps(spec.to_dict()))
    assert fields["export_target"] == "gguf"
    assert HQQSpec.from_dict(fields) == spec
    assert spec.format_version == HQQSpec(symmetric=True).format_version == 6
    for plain in (HQQSpec(), HQQSpec(integer_zero=True)):
        assert plain.format_version == 1
        assert not {"export_target", "symmetric"} & plain.to_dict().keys()
