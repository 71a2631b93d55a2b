"""The AQLM quantizer by plain error: every step lowers it, and it stands its ground on hard weights."""

import pytest
import torch

from peft_quantlayers.quantizers import AQLMMethod, AQLMSpec
from peft_quantlayers.quantizers._aqlm_solver import (
    fitted_codebooks,
    fitted_scales,
    improved_codes,
    initial_codes,
    nearest_entries,
    reconstruct,
)


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(weight: torch.Tensor, spec: AQLMSpec) -> float:
    method = AQLMMethod()
    quantized = method.quantize(weight, spec, name="layer")
    dense = method.dequantize(quantized.tensors, spec, in_features=weight.shape[1], dtype=torch.float32)
    return float((dense - weight).norm() / weight.norm())


def test_nearest_entries_are_the_nearest():
    vectors, entries = weight_of(500, 8), weight_of(32, 8, seed=1)
    assert torch.equal(nearest_entries(vectors, entries), torch.cdist(vectors, entries).argmin(1))


def test_each_step_of_the_solver_lowers_the_weighted_error():
    vectors = weight_of(3000, 8) * 50
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(2)) + 0.1
    codes, codebooks = initial_codes(
        vectors, num_codebooks=2, size=16, weights=weights, generator=torch.Generator().manual_seed(0)
    )

    def error() -> float:
        return float(((vectors - reconstruct(codes, codebooks)).square().sum(1) * weights).sum())

    errors = [error()]
    for _ in range(3):
        codebooks = fitted_codebooks(vectors, codes, codebooks, weights)
        errors.append(error())
        codes = improved_codes(vectors, codes, codebooks, passes=1)
        errors.append(error())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.97 * errors[0]


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_fitted_codebooks_are_the_least_squares_solution(num_codebooks):
    vectors, weights = weight_of(400, 4).double(), torch.rand(400).double() + 0.1
    codes = torch.randint(0, 8, (400, num_codebooks), generator=torch.Generator().manual_seed(1))
    fitted = fitted_codebooks(vectors.float(), codes, torch.zeros(num_codebooks, 8, 4), weights.float())
    one_hot = torch.cat([torch.nn.functional.one_hot(codes[:, m], 8) for m in range(num_codebooks)], dim=1).double()
    root = weights.sqrt()[:, None]
    best = one_hot @ torch.linalg.lstsq(one_hot * root, vectors * root, driver="gelsd").solution
    torch.testing.assert_close(reconstruct(codes, fitted).double(), best, rtol=1e-3, atol=1e-5)


def test_entries_that_nobody_chose_stay_where_they_were():
    vectors = weight_of(50, 4)
    codes = torch.zeros(50, 2, dtype=torch.int64)
    codebooks = weight_of(2, 8, 4, seed=3)
    fitted = fitted_codebooks(vectors, codes, codebooks, torch.ones(50))
    torch.testing.assert_close(fitted[:, 1:], codebooks[:, 1:])


def test_fitted_scales_are_least_squares_and_keep_rows_of_zeros():
    rows, sums = weight_of(6, 20), weight_of(6, 20, seed=1) + weight_of(6, 20)
    sums[2] = 0
    fitted = fitted_scales(rows, sums, torch.full((6,), 7.0))
    expected = (rows * sums).sum(1) / sums.square().sum(1)
    assert fitted[2] == 7.0
    torch.testing.assert_close(fitted[expected > 0], expected[expected > 0])


def test_more_rounds_and_more_bits_err_less():
    weight = weight_of(128, 256)
    errors = [relative_error(weight, AQLMSpec(nbits_per_codebook=6, rounds=rounds)) for rounds in (0, 2, 6)]
    assert errors == sorted(errors, reverse=True)
    assert relative_error(weight, AQLMSpec(num_codebooks=4, nbits_per_codebook=6)) < 0.7 * errors[-1]


def test_quantizing_is_deterministic_under_its_seed_and_leaves_its_input():
    weight = weight_of(64, 64)
    before, method = weight.clone(), AQLMMethod()
    spec = AQLMSpec(nbits_per_codebook=5)
    first, second = (method.quantize(weight, spec, name="layer").tensors for _ in range(2))
    other = method.quantize(weight, AQLMSpec(nbits_per_codebook=5, seed=1), name="layer").tensors
    assert torch.equal(weight, before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["codes"], other["codes"])


@pytest.mark.parametrize(
    "spec",
    [
        AQLMSpec(num_codebooks=1, nbits_per_codebook=12),
        AQLMSpec(num_codebooks=1, nbits_per_codebook=1, in_group_size=1),
        AQLMSpec(num_codebooks=3, nbits_per_codebook=4, in_group_size=4, out_group_size=2),
        AQLMSpec(num_codebooks=2, nbits_per_codebook=8, scale_dtype="float32"),
    ],
    ids=str,
)
def test_every_scheme_keeps_its_layout(spec):
    quantized = AQLMMethod().quantize(weight_of(32, 64), spec, name="layer")
    quantized.check("layer")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(32, 64), torch.ones(32, 64), weight_of(32, 64) * 1e-4, weight_of(32, 64) + 5],
    ids=["zeros", "ones", "tiny", "offset"],
)
def test_hard_weights_stay_finite_and_close(weight):
    method, spec = AQLMMethod(), AQLMSpec(nbits_per_codebook=6)
    quantized = method.quantize(weight, spec, name="layer")
    dense = method.dequantize(quantized.tensors, spec, in_features=64, dtype=torch.float32)
    assert torch.isfinite(dense).all()
    assert (dense - weight).norm() <= 0.5 * weight.norm()


def test_bits_per_weight_count_the_codebooks():
    quantized = AQLMMethod().quantize(weight_of(64, 128), AQLMSpec(nbits_per_codebook=4), name="layer")
    codes, codebooks, scales = 64 * 16 * 2 * 8, 2 * 16 * 8 * 16, 64 * 16
    assert quantized.bits_per_weight == (codes + codebooks + scales) / (64 * 128)


def test_bad_weights_are_refused_with_layer_and_remedy():
    with pytest.raises(ValueError, match=r"q_proj.*in_group_size=8.*skip_modules"):
        AQLMMethod().quantize(weight_of(8, 20), AQLMSpec(), name="q_proj")
    broken = weight_of(8, 16)
    broken[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"q_proj.*NaN or Inf"):
        AQLMMethod().quantize(broken, AQLMSpec(), name="q_proj")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"nbits_per_codebook": 17}, ValueError),
        ({"num_codebooks": 0}, ValueError),
        ({"in_group_size": "8"}, TypeError),
        ({"scale_dtype": "int8"}, ValueError),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(fields, error):
    with pytest.raises(error, match=next(iter(fields))):
        AQLMSpec(**fields)
