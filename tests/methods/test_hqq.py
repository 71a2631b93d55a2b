"""HQQ on whole weights: shapes, dtypes, refusals, hard weights, and what a second quantization leaves."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.layers.quantize_weight import quantize_weight
from peft_quantlayers.methods import HQQMethod, HQQSpec, spec_from_dict
from peft_quantlayers.methods.hqq import fitted_weight
from quantlayers_kernels.bitpack import SUPPORTED_NBITS, unpack
from quantlayers_kernels.hqq.solve import HalfQuadraticOptions, encode, solve_groups

METHOD = HQQMethod()


def quantize(weight: torch.Tensor, **fields) -> QuantizedWeight:
    return quantize_weight(weight, HQQSpec(**fields), layer_name="model.layers.0.q_proj")


def dequantize(quantized: QuantizedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return METHOD.dequantize(quantized, dtype=dtype)


def random_weight(out_features: int = 24, in_features: int = 96, std: float = 0.02) -> torch.Tensor:
    return std * torch.randn(out_features, in_features)


def grouped(matrix: torch.Tensor, axis: int, n_per_group: int) -> torch.Tensor:
    """Rows are groups; axis 0 puts ``out_features / group_size`` rows between two of a group."""
    if axis == 1:
        return matrix.reshape(-1, n_per_group)
    n_groups = matrix.shape[0] // n_per_group
    rows = [matrix[group::n_groups] for group in range(n_groups)]  # (n_per_group, in_features) each
    return torch.cat([part.t() for part in rows])


def assert_same_bits(first: QuantizedWeight, second: QuantizedWeight) -> None:
    assert first.spec == second.spec
    assert set(first.tensors) == set(second.tensors)
    for name, tensor in first.tensors.items():
        assert tensor.dtype == second.tensors[name].dtype
        assert torch.equal(tensor, second.tensors[name]), name


@pytest.mark.parametrize("scale_dtype", ["float32", "float16"])
@pytest.mark.parametrize("group_size", [1, 3, 8, 24, None])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("refine_scale", [True, False])
def test_each_group_is_solved_and_coded_with_its_stored_metadata(axis, group_size, scale_dtype, refine_scale):
    weight = random_weight()
    quantized = quantize(
        weight, nbits=3, axis=axis, group_size=group_size, scale_dtype=scale_dtype, refine_scale=refine_scale
    )
    quantized.check("layer")
    assert quantized.spec.scale_dtype == scale_dtype
    n_per_group = group_size or weight.shape[axis]
    groups = grouped(weight, axis, n_per_group).contiguous()
    scale, zero = solve_groups(
        groups, nbits=3, options=HalfQuadraticOptions(), round_zero=True, refine_scale=refine_scale
    )
    dtype = getattr(torch, scale_dtype)
    scale, zero = scale.to(dtype), zero.to(dtype)
    assert torch.equal(quantized.tensors["scale"].reshape(-1, 1), scale)
    assert torch.equal(quantized.tensors["zero"].reshape(-1, 1), zero)
    codes = unpack(quantized.tensors["W_q"], 3, weight.shape[1])
    expected = encode(groups, scale.float(), zero.float(), max_code=7)
    assert torch.equal(grouped(codes, axis, n_per_group).float(), expected)
    rebuilt = (expected - zero.float()) * scale.float()
    assert torch.equal(grouped(dequantize(quantized), axis, n_per_group), rebuilt)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_weight_is_not_written_into(axis, dtype):
    for nbits in (2, 8):
        weight = random_weight().to(dtype).requires_grad_()
        before = weight.detach().clone()
        quantized = quantize(weight, nbits=nbits, axis=axis, group_size=8)
        assert torch.equal(weight, before)
        assert not any(tensor.requires_grad for tensor in quantized.tensors.values())


@pytest.mark.parametrize("axis", [0, 1])
def test_the_result_depends_on_neither_the_run_nor_the_chunks(axis, monkeypatch):
    weight = random_weight(std=0.3)
    expected = quantize(weight, nbits=2, axis=axis, group_size=12)
    assert_same_bits(quantize(weight, nbits=2, axis=axis, group_size=12), expected)
    for chunk in (1, 12, 100, 1000):
        monkeypatch.setattr(fitted_weight, "CPU_CHUNK_WEIGHTS", chunk)
        assert_same_bits(quantize(weight, nbits=2, axis=axis, group_size=12), expected)


def test_a_weight_that_is_not_contiguous_gives_the_same_bits():
    weight = random_weight(std=0.3)
    transposed = weight.t().contiguous().t()
    assert not transposed.is_contiguous()
    for axis in (0, 1):
        assert_same_bits(
            quantize(transposed, nbits=3, axis=axis, group_size=12),
            quantize(weight, nbits=3, axis=axis, group_size=12),
        )


def test_a_row_does_not_depend_on_the_other_rows():
    weight = random_weight(std=0.3)
    together = quantize(weight, nbits=2, group_size=24)
    for row in (0, 7, 23):
        alone = quantize(weight[row : row + 1], nbits=2, group_size=24)
        for name, tensor in together.tensors.items():
            assert torch.equal(tensor[row : row + 1], alone.tensors[name]), name


def test_half_precision_weights_are_solved_in_float32():
    weight = random_weight().to(torch.bfloat16)
    assert_same_bits(quantize(weight, nbits=4, group_size=24), quantize(weight.float(), nbits=4, group_size=24))


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_the_error_is_at_most_that_of_plain_rounding_to_the_range(nbits, scale_dtype):
    weight = random_weight(64, 128)
    quantized = quantize(weight, nbits=nbits, scale_dtype=scale_dtype)
    assert quantized.spec.scale_dtype == scale_dtype
    groups = weight.reshape(-1, 64)
    low, high = groups.aminmax(dim=1, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    plain = ((groups - low) / scale).round() * scale + low
    # bfloat16 has 8 bits of its own: at 8 bits its rounding of the metadata shows (measured: 1.4 times)
    allowed = 1.6 if (nbits, scale_dtype) == (8, "bfloat16") else 1.0
    assert (dequantize(quantized) - weight).norm() <= allowed * (plain - groups).norm()


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
def test_constant_and_zero_groups_are_exact_to_the_metadata(axis, scale_dtype):
    weight = random_weight(16, 32)
    weight[:, :16] = 0.0
    weight[:, 16] = 0.7
    weight[4:, 17:] = -1e-3
    weight[0, 16:] = 0.7
    dtype = getattr(torch, scale_dtype)
    quantized = quantize(weight, nbits=3, group_size=16, axis=axis, scale_dtype=scale_dtype)
    assert quantized.spec.scale_dtype == scale_dtype
    rebuilt = dequantize(quantized)
    if axis == 1:
        assert (rebuilt[:, :16] == 0).all()
        assert (rebuilt[0, 16:] == torch.tensor(0.7).to(dtype)).all()
    else:
        assert (rebuilt[:, :16] == 0).all()
        assert (rebuilt[:, 16] == torch.tensor(0.7).to(dtype)).all()


# mean, std, and dtypes of metadata that hold such groups at 4 bits; the others fall back to float32
HARD = {
    "tiny": (0.0, 1e-5, {"float16", "bfloat16", "float32"}),
    "tinier": (0.0, 1e-8, {"bfloat16", "float32"}),
    "offset": (5.0, 1e-3, {"float32"}),
    "far offset": (1000.0, 0.01, {"float32"}),
    "huge": (0.0, 1e6, {"bfloat16", "float32"}),
}


@pytest.mark.parametrize("scale_dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", HARD)
@pytest.mark.parametrize("nbits", [2, 4, 8])
def test_hard_weights_are_as_exact_as_a_float64_computation(kind, axis, scale_dtype, nbits, caplog):
    mean, std, dtypes = HARD[kind]
    weight = random_weight(128, 64, std) + mean
    with caplog.at_level(logging.WARNING, logger="peft_quantlayers"):
        quantized = quantize(weight, nbits=nbits, axis=axis, scale_dtype=scale_dtype)
    kept = quantized.spec.scale_dtype
    assert kept in (scale_dtype, "float32")
    if nbits == 4:
        assert kept == (scale_dtype if scale_dtype in dtypes else "float32")
    if kept != scale_dtype:
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "model.layers.0.q_proj" in caplog.text
        assert scale_dtype in caplog.text
    else:
        assert not caplog.records
    assert all(torch.isfinite(tensor).all() for tensor in quantized.tensors.values())

    groups = grouped(weight.double(), axis, 64)
    scale, zero = solve_groups(groups, nbits=nbits, options=HalfQuadraticOptions(), round_zero=True, refine_scale=True)
    best = (encode(groups, scale, zero, max_code=2**nbits - 1) - zero) * scale
    best_error = (best - groups).norm() / groups.numel() ** 0.5 / std
    error = (dequantize(quantized).double() - weight.double()).norm() / weight.numel() ** 0.5 / std
    # float32 itself holds a mean of 1000 to 6e-5, 0.6 % of the std: visible beside 8 bits' own 0.5 %
    float32_step = abs(mean) * 2**-24 / std
    dtype_step = 0.75 * torch.finfo(getattr(torch, kept)).eps
    assert error <= 1.02 * best_error + 2 * float32_step + dtype_step


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_refused_by_name(bad, dtype):
    weight = random_weight().to(dtype)
    weight[17, 5] = bad
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q_proj.*NaN or Inf.*skip_modules"):
        quantize(weight, group_size=8)


def test_both_infinities_in_a_group_are_refused():
    weight = random_weight()
    weight[0, 0], weight[0, 1] = float("inf"), float("-inf")
    with pytest.raises(ValueError, match="NaN or Inf"):
        quantize(weight, group_size=8)


def test_large_finite_weights_are_not_mistaken_for_infinite_ones():
    weight = torch.full((4, 64), 3e37)
    assert torch.equal(dequantize(quantize(weight, scale_dtype="float32")), weight)


@pytest.mark.parametrize(("axis", "side"), [(1, "in_features=96"), (0, "out_features=24")])
def test_a_group_size_that_does_not_divide_is_refused_with_one_that_does(axis, side):
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.q_proj: {side} is not a multiple") as refusal:
        quantize(random_weight(), group_size=40, axis=axis)
    text = str(refusal.value)
    assert "skip_modules=['model.layers.0.q_proj']" in text
    proposed = int(text.split("for example ")[1].split(")")[0])
    assert quantize(random_weight(), group_size=proposed, axis=axis).spec.group_size == proposed
    assert proposed == (48 if axis == 1 else 24) or proposed == 32


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        ({"nbits": 4}, 4.5),
        ({"nbits": 3}, 3.5),
        ({"nbits": 2, "group_size": 16}, 4.0),
        ({"nbits": 8, "group_size": 128}, 8.25),
        ({"nbits": 5, "scale_dtype": "float32"}, 6.0),
        ({"nbits": 1, "group_size": None}, 1.125),
        ({"nbits": 4, "axis": 0}, 4.5),
    ],
)
def test_bits_per_weight_count_codes_and_metadata(fields, bits):
    quantized = quantize(random_weight(128, 256), **fields)
    assert quantized.bits_per_weight == bits
    assert sum(tensor.nbytes for tensor in quantized.tensors.values()) * 8 == bits * 128 * 256


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_integer_zeros_are_stored_whole(nbits):
    quantized = quantize(random_weight(), nbits=nbits, group_size=8, integer_zero=True)
    zero = quantized.tensors["zero"].float()
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0
    assert zero.max() <= 2**nbits - 1


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
@pytest.mark.parametrize("axis", [0, 1])
def test_quantizing_again_moves_next_to_no_group(axis, nbits):
    """The codes of a group span its range again, so that its grid is found again.

    Unless the first and the last code were not both used, or the second start leads to another grid with a lower
    error: then that group moves. Measured: none of 256 groups, or one; and at the third time one in one of 14 cases.
    """
    weight = random_weight(64, 256)
    first = quantize(weight, nbits=nbits, axis=axis)
    second = quantize(dequantize(first), nbits=nbits, axis=axis)
    third = quantize(dequantize(second), nbits=nbits, axis=axis)

    def n_moved(before: QuantizedWeight, after: QuantizedWeight) -> int:
        change = grouped(dequantize(after) - dequantize(before), axis, 64).abs().amax(1)
        return int((change > 0.01 * grouped(dequantize(before), axis, 64).std(1)).sum())

    assert n_moved(first, second) <= 2
    assert n_moved(second, third) <= 1


specs = st.builds(
    HQQSpec,
    nbits=st.sampled_from(SUPPORTED_NBITS),
    group_size=st.none() | st.integers(1, 1 << 24),
    axis=st.sampled_from([0, 1]),
    scale_dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    integer_zero=st.booleans(),
    round_zero=st.booleans(),
    refine_scale=st.booleans(),
    iters=st.integers(0, 10_000),
    lp_norm=st.floats(0, 1, exclude_min=True),
    beta=st.floats(0, 1e6, exclude_min=True),
    kappa=st.floats(0, 10, exclude_min=True),
)


@settings(max_examples=100, deadline=None)
@given(spec=specs)
def test_a_spec_survives_json(spec):
    fields = json.loads(json.dumps(spec.to_dict()))
    assert fields["method"] == "hqq"
    assert HQQSpec.from_dict(fields) == spec
    assert spec_from_dict(fields) == spec
    assert hash(HQQSpec.from_dict(fields)) == hash(spec)


def test_from_dict_leaves_its_argument_alone():
    fields = HQQSpec().to_dict()
    before = dict(fields)
    HQQSpec.from_dict(fields)
    assert fields == before


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("nbits", 7, ValueError),
        ("nbits", 4.0, ValueError),
        ("nbits", True, ValueError),
        ("nbits", "4", ValueError),
        ("axis", 2, ValueError),
        ("axis", False, ValueError),
        ("group_size", 0, ValueError),
        ("group_size", -64, ValueError),
        ("group_size", (1 << 24) + 1, ValueError),
        ("group_size", 64.0, TypeError),
        ("group_size", "64", TypeError),
        ("group_size", True, TypeError),
        ("scale_dtype", "float64", ValueError),
        ("scale_dtype", torch.int8, ValueError),
        ("integer_zero", 1, ValueError),
        ("round_zero", 1, ValueError),
        ("refine_scale", "yes", ValueError),
        ("iters", -1, ValueError),
        ("iters", 20.0, TypeError),
        ("lp_norm", 0.0, ValueError),
        ("lp_norm", 1.1, ValueError),
        ("beta", float("nan"), ValueError),
        ("beta", float("inf"), ValueError),
        ("kappa", "1.01", TypeError),
        ("kappa", True, TypeError),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_field(field, value, error):
    with pytest.raises(error, match=field):
        HQQSpec(**{field: value})
    with pytest.raises(error, match=field):
        HQQSpec.from_dict({field: value})


def test_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match=r"\['groupsize'\]"):
        HQQSpec.from_dict({"nbits": 4, "groupsize": 64})


def test_a_spec_of_another_method_is_refused():
    with pytest.raises(ValueError, match="expected a spec of method 'hqq', got 'aqlm'"):
        HQQSpec.from_dict({"method": "aqlm"})
    with pytest.raises(ValueError, match="unknown quantization method 'no-such-method'"):
        spec_from_dict({"method": "no-such-method"})
    for nonsense in (None, [], "hqq", {}, {"method": 3}):
        with pytest.raises(TypeError, match="method"):
            spec_from_dict(nonsense)


def test_a_spec_cannot_be_changed():
    with pytest.raises(AttributeError):
        HQQSpec().nbits = 8
