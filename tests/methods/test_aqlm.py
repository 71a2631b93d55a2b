"""The AQLM quantizer by plain error: every step lowers it, and it stands its ground on hard weights."""

import dataclasses
from itertools import pairwise

import pytest
import torch

from peft_quantlayers.formats import QuantizedWeight
from peft_quantlayers.layers.quantize_weight import quantize_weight
from peft_quantlayers.methods import AQLMMethod, AQLMSpec
from peft_quantlayers.methods.aqlm import method as aqlm
from peft_quantlayers.methods.aqlm import solver as _aqlm_solver
from peft_quantlayers.methods.aqlm.solver import (
    Additive,
    Problem,
    fitted_codebooks,
    fitted_scales,
    improved_codes,
    initial_solution,
    nearest_entries,
)
from quantlayers_kernels import native
from quantlayers_kernels.aqlm.choice import chosen_codes, entry_sums, groups_to_matrix, matrix_to_groups


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(weight: torch.Tensor, spec: AQLMSpec) -> float:
    method = AQLMMethod()
    quantized = method.quantize(weight, spec)
    dense = method.dequantize(quantized)
    return float((dense - weight).norm() / weight.norm())


def test_nearest_entries_are_the_nearest():
    vectors, entries = weight_of(500, 8), weight_of(32, 8, seed=1)
    assert torch.equal(nearest_entries(vectors, entries), torch.cdist(vectors, entries).argmin(1))


def test_nearest_entries_weigh_each_place_by_its_importance():
    vectors, entries = weight_of(300, 4), weight_of(16, 4, seed=1)
    importance = torch.rand(300, 4, generator=torch.Generator().manual_seed(2)) + 0.01
    errors = ((vectors[:, None] - entries).square() * importance[:, None]).sum(2)
    assert torch.equal(nearest_entries(vectors, entries, importance), errors.argmin(1))


def test_groups_and_matrix_are_the_same_weight():
    matrix = weight_of(6, 12)
    groups = matrix_to_groups(matrix, 2, 4)
    assert groups.shape == (3, 3, 8)
    assert torch.equal(groups[1, 2].view(2, 4), matrix[2:4, 8:12])
    assert torch.equal(groups_to_matrix(groups, 2), matrix)


def second_moment(in_features: int, seed: int = 5) -> torch.Tensor:
    """Of inputs whose channels differ in size and hang together."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) * torch.rand(in_features, generator=generator)
    return mixing.t() @ mixing / in_features + 0.01 * torch.eye(in_features)


@pytest.mark.parametrize("beam", [1, 3])
def test_chosen_codes_are_the_best_one_change_at_a_time_or_better(beam):
    generator = torch.Generator().manual_seed(0)
    codebooks, pull = torch.randn(2, 8, 4, generator=generator), torch.randn(50, 4, generator=generator)
    block = second_moment(4)
    codes = torch.randint(0, 8, (50, 2), generator=generator)

    def costs(codes: torch.Tensor) -> torch.Tensor:
        sums = entry_sums(codes, codebooks)
        return ((sums @ block) * sums).sum(-1) - 2 * (pull * sums).sum(-1)

    found = chosen_codes(pull, codes, codebooks, block, beam=beam)
    all_pairs = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    best = torch.stack([costs(pair.expand(50, 2)) for pair in all_pairs]).min(0).values
    last = torch.stack([costs(torch.stack([found[:, 0], torch.full((50,), k)], 1)) for k in range(8)]).min(0).values
    torch.testing.assert_close(costs(found), last)
    assert (costs(found) <= costs(codes) + 1e-5).all()
    assert (costs(found) >= best - 1e-5).all()
    if beam == 3:
        narrow = chosen_codes(pull, codes, codebooks, block, beam=1)
        assert costs(found).sum() < costs(narrow).sum()


@pytest.mark.parametrize("is_calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("out_group", [1, 2])
def test_each_step_of_the_solver_lowers_the_error(is_calibrated, out_group):
    problem = Problem(
        target=matrix_to_groups(weight_of(96, 272), out_group, 8),
        hessian=second_moment(272) if is_calibrated else None,
        out_group=out_group,
    )
    found = initial_solution(problem, num_codebooks=2, size=16, generator=torch.Generator().manual_seed(0))
    errors = [problem.error(found)]
    for _ in range(3):
        for step in (fitted_codebooks, lambda p, f: improved_codes(p, f, beam=2), fitted_scales):
            found = step(problem, found)
            errors.append(problem.error(found))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < (0.9 if is_calibrated else 0.98) * errors[0]


def test_the_pull_that_is_kept_up_to_date_is_the_pull_that_is_formed_anew():
    problem = Problem(target=matrix_to_groups(weight_of(16, 320), 1, 8), hessian=second_moment(320), out_group=1)
    found = initial_solution(problem, num_codebooks=2, size=8, generator=torch.Generator().manual_seed(0))
    improved = improved_codes(problem, found, beam=1).codes
    codes = found.codes.clone()
    for group in range(40):
        here = slice(8 * group, 8 * group + 8)
        sums = entry_sums(codes, found.codebooks)
        residual = (problem.target / found.scales[:, None, None] - sums).view(16, 320)
        block = problem.hessian[here, here]
        pull = residual @ problem.hessian[:, here] + sums[:, group] @ block
        codes[:, group] = chosen_codes(pull, codes[:, group], found.codebooks, block, beam=1)
    assert (codes == improved).float().mean() > 0.99


@pytest.mark.parametrize("num_codebooks", [1, 2])
def test_fitted_codebooks_are_the_least_squares_solution(num_codebooks):
    target, generator = weight_of(25, 16, 4), torch.Generator().manual_seed(1)
    scales = torch.rand(25, generator=generator) + 0.5
    codes = torch.randint(0, 8, (25, 16, num_codebooks), generator=generator)
    hessian = second_moment(64)
    found = Additive(codes, torch.zeros(num_codebooks, 8, 4), scales)
    fitted = fitted_codebooks(Problem(target, hessian, 1), found, iters=200).groups().double().view(25, 64)

    one_hot = torch.cat([torch.nn.functional.one_hot(codes[..., m], 8) for m in range(num_codebooks)], dim=2).double()
    design = torch.einsum("ogk,ij->ogikj", one_hot * scales[:, None, None].double(), torch.eye(4).double())
    design = design.reshape(25, 64, -1)
    root = torch.linalg.cholesky(hessian.double()).t()
    wanted = (target.view(25, 64).double() @ root.t()).flatten()
    solution = torch.linalg.lstsq((root @ design).reshape(25 * 64, -1), wanted[:, None], driver="gelsd").solution
    torch.testing.assert_close(fitted, (design @ solution)[..., 0], rtol=1e-3, atol=1e-5)


def test_entries_that_no_code_names_stay_where_they_were():
    codebooks = weight_of(2, 8, 4, seed=3)
    found = Additive(torch.zeros(5, 10, 2, dtype=torch.int64), codebooks, torch.ones(5))
    fitted = fitted_codebooks(Problem(weight_of(5, 10, 4), None, 1), found).codebooks
    assert torch.equal(fitted[:, 1:], codebooks[:, 1:])
    assert not torch.equal(fitted[:, 0], codebooks[:, 0])


def test_fitted_scales_are_least_squares_and_keep_rows_of_zeros():
    codebooks = torch.cat([torch.zeros(1, 1, 4), weight_of(1, 7, 4, seed=1)], dim=1)
    codes = torch.randint(1, 8, (6, 5, 1), generator=torch.Generator().manual_seed(0))
    codes[2] = 0
    target = entry_sums(codes, codebooks) * torch.arange(1.0, 7.0)[:, None, None] + weight_of(6, 5, 4) * 0.1
    hessian = second_moment(20)
    fitted = fitted_scales(Problem(target, hessian, 1), Additive(codes, codebooks, torch.full((6,), 7.0))).scales
    sums, rows = entry_sums(codes, codebooks).view(6, 20), target.view(6, 20)
    expected = (rows @ hessian * sums).sum(1) / (sums @ hessian * sums).sum(1)
    assert fitted[2] == 7.0
    torch.testing.assert_close(fitted[expected > 0], expected[expected > 0])


def test_a_hessian_lowers_the_error_of_the_outputs():
    weight, hessian, method = weight_of(96, 128), second_moment(128), AQLMMethod()
    spec = AQLMSpec(nbits_per_codebook=5)

    def output_error(hessian_given: torch.Tensor | None) -> float:
        quantized = method.quantize(weight, spec, hessian=hessian_given)
        difference = method.dequantize(quantized) - weight
        return float(((difference @ hessian) * difference).sum())

    assert output_error(hessian) < 0.6 * output_error(None)


def test_more_rounds_and_more_bits_err_less():
    weight = weight_of(128, 256)
    errors = [relative_error(weight, AQLMSpec(nbits_per_codebook=6, rounds=rounds)) for rounds in (0, 2, 6)]
    assert errors == sorted(errors, reverse=True)
    assert relative_error(weight, AQLMSpec(num_codebooks=4, nbits_per_codebook=6)) < 0.7 * errors[-1]


def test_without_a_beam_all_pairs_of_two_codebooks_are_tried(monkeypatch):
    weight, method = weight_of(64, 64), AQLMMethod()

    def codes(**fields) -> torch.Tensor:
        return method.quantize(weight, AQLMSpec(nbits_per_codebook=5, rounds=1, **fields)).tensors["codes"]

    wide = codes(beam=32)
    assert torch.equal(codes(), wide if native.is_available() else codes(beam=8))
    assert torch.equal(codes(num_codebooks=3), codes(num_codebooks=3, beam=8))


def test_without_the_compiled_kernels_the_beam_is_narrow_and_said_to_be(monkeypatch, caplog):
    monkeypatch.setattr(native, "library", lambda: None)
    aqlm._warn_of_narrow_beam.cache_clear()
    weight, method = weight_of(64, 64), AQLMMethod()
    found, narrow = (
        [method.quantize(weight, AQLMSpec(nbits_per_codebook=5, rounds=1, beam=beam)) for _ in range(2)][1]
        for beam in (None, 8)
    )
    assert torch.equal(found.tensors["codes"], narrow.tensors["codes"])
    assert caplog.text.count("compiled kernels are missing") == 1


@pytest.mark.parametrize("is_calibrated", [False, True], ids=["plain", "calibrated"])
def test_the_solver_is_the_same_in_small_tiles_of_rows(is_calibrated, monkeypatch):
    weight, spec = weight_of(50, 64), AQLMSpec(nbits_per_codebook=4, rounds=2)
    hessian = second_moment(64) if is_calibrated else None
    whole = AQLMMethod().dequantize(AQLMMethod().quantize(weight, spec, hessian=hessian))
    monkeypatch.setattr(_aqlm_solver, "TILE_WEIGHTS", 7 * 64)
    tiled = AQLMMethod().dequantize(AQLMMethod().quantize(weight, spec, hessian=hessian))
    # A sum over tiles rounds differently, and a tie may fall the other way.
    assert (tiled - whole).norm() < 0.05 * whole.norm()
    assert abs((tiled - weight).norm() / (whole - weight).norm() - 1) < 0.01


def test_codebooks_fitted_to_a_sample_of_the_rows_are_nearly_as_good(monkeypatch):
    problem = Problem(matrix_to_groups(weight_of(2048, 64), 1, 8), second_moment(64), 1)
    found = initial_solution(problem, num_codebooks=2, size=4, generator=torch.Generator().manual_seed(0))
    start = problem.error(found)
    sampled = problem.error(fitted_codebooks(problem, found))
    monkeypatch.setattr(_aqlm_solver, "WEIGHTS_PER_NUMBER", 1 << 30)
    whole = problem.error(fitted_codebooks(problem, found))
    assert whole < sampled < min(start, (1 + 3 / 512) * whole)


def test_quantizing_is_deterministic_under_its_seed_and_leaves_its_input():
    weight = weight_of(64, 64)
    before, method = weight.clone(), AQLMMethod()
    spec = AQLMSpec(nbits_per_codebook=5)
    first, second = (method.quantize(weight, spec).tensors for _ in range(2))
    other = method.quantize(weight, AQLMSpec(nbits_per_codebook=5, seed=1)).tensors
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
    quantized = AQLMMethod().quantize(weight_of(32, 64), spec)
    quantized.check("layer")


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(32, 64), torch.ones(32, 64), weight_of(32, 64) * 1e-4, weight_of(32, 64) + 5],
    ids=["zeros", "ones", "tiny", "offset"],
)
def test_hard_weights_stay_finite_and_close(weight):
    method, spec = AQLMMethod(), AQLMSpec(nbits_per_codebook=6)
    quantized = method.quantize(weight, spec)
    dense = method.dequantize(quantized)
    assert torch.isfinite(dense).all()
    assert (dense - weight).norm() <= 0.5 * weight.norm()


def test_bits_per_weight_count_the_codebooks():
    quantized = AQLMMethod().quantize(weight_of(64, 128), AQLMSpec(nbits_per_codebook=4))
    codes, codebooks, scales = 64 * 16 * 2 * 8, 2 * 16 * 8 * 16, 64 * 16
    assert quantized.bits_per_weight == (codes + codebooks + scales) / (64 * 128)


def test_bad_weights_are_refused_with_layer_and_remedy():
    with pytest.raises(ValueError, match=r"q_proj.*in_group_size=8.*skip_modules"):
        quantize_weight(weight_of(8, 20), AQLMSpec(), layer_name="q_proj")
    broken = weight_of(8, 16)
    broken[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"q_proj.*NaN or Inf"):
        quantize_weight(broken, AQLMSpec(), layer_name="q_proj")
    for hessian in (torch.full((16, 16), torch.nan), torch.zeros(16, 16)):
        with pytest.raises(ValueError, match=r"q_proj.*Hessian.*damping"):
            quantize_weight(weight_of(8, 16), AQLMSpec(), hessian=hessian, layer_name="q_proj")


def test_weights_too_small_for_the_dtype_of_the_scales_widen_it_with_a_warning(caplog):
    weight = weight_of(16, 64)
    spec = AQLMSpec(nbits_per_codebook=4)
    wide = quantize_weight(1e-9 * weight, spec, layer_name="q_proj")
    assert "q_proj: float16 cannot hold" in caplog.text
    caplog.clear()
    assert wide.spec == dataclasses.replace(spec, scale_dtype="float32")
    wide.check("q_proj")
    assert (AQLMMethod().dequantize(wide) - 1e-9 * weight).norm() < 0.7e-9 * weight.norm()
    weight[3] *= 1e-9  # a dead output beside others is not worth more bits
    assert quantize_weight(weight, spec, layer_name="q_proj").spec == spec
    assert not caplog.text


def test_scales_that_float32_cannot_hold_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(aqlm, "fitted_codebooks", lambda _, found: dataclasses.replace(found, scales=found.scales / 0))
    with pytest.raises(ValueError, match=r"q_proj.*float32 cannot.*skip_modules"):
        quantize_weight(weight_of(16, 64), AQLMSpec(nbits_per_codebook=4, rounds=0), layer_name="q_proj")


@pytest.mark.parametrize("nbits", [4, 12])
def test_codes_outside_the_codebook_are_refused_when_they_are_loaded_and_wrapped_or_plain_ones_are_not(nbits):
    spec, size = AQLMSpec(num_codebooks=1, nbits_per_codebook=nbits, rounds=0), 2**nbits
    quantized = AQLMMethod().quantize(weight_of(16, 64), spec)
    codes = quantized.tensors["codes"]

    def with_first_code(code: int) -> QuantizedWeight:
        changed = codes.clone()
        changed[0, 0, 0] = code
        return dataclasses.replace(quantized, tensors=quantized.tensors | {"codes": changed})

    for code in (-size // 2, size - 1):
        with_first_code(code).check("layer")
    dataclasses.replace(quantized, tensors=quantized.tensors | {"codes": codes % size}).check("layer")
    for code in (-size // 2 - 1, size):
        with pytest.raises(ValueError, match=rf"layer\.codes holds codes from .*{size} entries.*[Dd]ownload"):
            with_first_code(code).check("layer")


def test_codes_that_no_codebook_has_are_read_as_their_low_bits():
    """The published layout stores a byte for a code of 4 bits; what its upper half says must not reach beyond."""
    quantized = AQLMMethod().quantize(weight_of(16, 64), AQLMSpec(nbits_per_codebook=4))
    codes = quantized.tensors["codes"]
    wild = dataclasses.replace(quantized, tensors=quantized.tensors | {"codes": codes + 16 * (codes % 5)})
    assert torch.equal(AQLMMethod().dequantize(wild), AQLMMethod().dequantize(quantized))
    wider = dataclasses.replace(quantized, tensors=quantized.tensors | {"codes": codes.short()})
    with pytest.raises(ValueError, match=r"layer\.codes: expected torch\.int8"):
        wider.check("layer")


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


def test_scales_get_a_right_gradient_beside_a_bias_that_is_much_larger_than_the_product():
    """In bfloat16 such a bias would take the product's last digits, from which the scales' gradient is read."""
    method, spec = AQLMMethod(), AQLMSpec(num_codebooks=2, nbits_per_codebook=8)
    quantized = method.quantize(weight_of(32, 64), spec)
    x, grad, bias = torch.randn(16, 64), torch.randn(16, 32), torch.full((32,), 30.0)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        tensors = {name: tensor.clone() for name, tensor in quantized.tensors.items()}
        scales = tensors["scales"] = tensors["scales"].float().requires_grad_()
        weight = dataclasses.replace(quantized, tensors=tensors)
        method.linear(x.to(dtype), weight, bias.to(dtype)).backward(grad.to(dtype))
        grads[dtype] = scales.grad.flatten()
    error = (grads[torch.bfloat16] - grads[torch.float32]).norm() / grads[torch.float32].norm()
    assert error < 1e-2
