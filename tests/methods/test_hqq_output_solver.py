"""Calibrated HQQ: each step lowers the error of the outputs, and the format stays what it is."""

import pytest
import torch

from peft_quantlayers.methods import HQQMethod, HQQSpec
from peft_quantlayers.methods.hqq.output_solver import Grid, descended_codes, fitted_grid, weighted_grid

OUT, IN, GROUP = 40, 192, 32


def random_weight() -> torch.Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02


def second_moment() -> torch.Tensor:
    """Of inputs whose channels differ in size and hang together."""
    generator = torch.Generator().manual_seed(5)
    mixing = torch.randn(IN, IN, generator=generator) * torch.rand(IN, generator=generator)
    return mixing.t() @ mixing / IN + 0.01 * torch.eye(IN)


def output_error(weight: torch.Tensor, dense: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (weight - dense).view(OUT, IN)
    return float((difference @ hessian * difference).sum())


def plain_grid(groups: torch.Tensor, max_code: int) -> Grid:
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low) / max_code
    return Grid(scale, -low / scale, max_code)


@pytest.mark.parametrize("max_code", [15, 3])
def test_each_step_lowers_the_error_of_the_outputs(max_code):
    groups, hessian = random_weight().view(OUT, -1, GROUP), second_moment()
    grid = plain_grid(groups, max_code)
    codes = grid.nearest_codes(groups)
    errors = [output_error(groups, grid.values(codes), hessian)]
    for _ in range(2):
        codes = descended_codes(groups, codes, grid, hessian, sweeps=1)
        errors.append(output_error(groups, grid.values(codes), hessian))
        grid = fitted_grid(groups, codes, grid, hessian)
        errors.append(output_error(groups, grid.values(codes), hessian))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_after_enough_sweeps_no_single_code_can_do_better():
    groups, hessian = random_weight().view(OUT, -1, GROUP), second_moment()
    grid = plain_grid(groups, 7)
    codes = descended_codes(groups, grid.nearest_codes(groups), grid, hessian, sweeps=30)
    residual = (groups - grid.values(codes)).view(OUT, IN)
    pull, step = residual @ hessian, grid.scale.repeat_interleave(GROUP, 1)
    for direction in (-1.0, 1.0):
        gain = 2 * direction * step * pull - step.square() * hessian.diagonal()
        moved = codes.view(OUT, IN) + direction
        assert (gain[(moved >= 0) & (moved <= 7)] < 1e-6).all()


def test_the_weighted_grid_is_least_squares_for_its_own_codes():
    groups = random_weight().double().view(OUT, -1, GROUP)
    importance = torch.rand(IN // GROUP, GROUP, generator=torch.Generator().manual_seed(1)).double() + 0.1
    grid = weighted_grid(groups, plain_grid(groups, 3), importance)
    again = weighted_grid(groups, grid, importance)
    for _ in range(5):
        grid, again = again, weighted_grid(groups, again, importance)
    codes = again.nearest_codes(groups)[3, 2]
    root = importance[2].sqrt()
    design = torch.stack([codes, torch.ones_like(codes)], 1) * root[:, None]
    slope, offset = torch.linalg.lstsq(design, (groups[3, 2] * root)[:, None]).solution.flatten()
    torch.testing.assert_close(again.scale[3, 2], slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(-again.zero[3, 2] * again.scale[3, 2], offset, rtol=1e-6, atol=1e-9)


def test_the_fitted_grid_is_the_least_squares_solution_of_a_row():
    groups, hessian = random_weight().view(OUT, -1, GROUP), second_moment()
    grid = plain_grid(groups, 3)
    codes = grid.nearest_codes(groups)
    fitted = fitted_grid(groups, codes, grid, hessian, iters=300).values(codes).double().view(OUT, IN)
    root = torch.linalg.cholesky(hessian.double()).t()
    columns = torch.block_diag(*[torch.stack([c, torch.ones_like(c)], 1) for c in codes[4].double()])
    solution = torch.linalg.lstsq(root @ columns, root @ groups[4].double().view(IN, 1)).solution
    torch.testing.assert_close(fitted[4], (columns @ solution).flatten(), rtol=1e-3, atol=1e-5)


def test_scales_beside_zeros_that_stay_are_the_least_squares_solution_of_a_row():
    groups, hessian = random_weight().view(OUT, -1, GROUP), second_moment()
    grid = plain_grid(groups, 3)
    codes = grid.nearest_codes(groups)
    fitted = fitted_grid(groups, codes, grid, hessian, keeps_zeros=True, iters=300)
    assert torch.equal(fitted.zero, grid.zero)
    root = torch.linalg.cholesky(hessian.double()).t()
    steps = (codes - grid.zero[..., None])[4].double()
    columns = torch.block_diag(*[step[:, None] for step in steps])
    solution = torch.linalg.lstsq(root @ columns, root @ groups[4].double().view(IN, 1)).solution
    torch.testing.assert_close(fitted.scale[4].double(), solution.flatten(), rtol=1e-3, atol=1e-6)


WHOLE = [{"nbits": 3, "integer_zero": True}, {"nbits": 3, "symmetric": True}]


@pytest.mark.parametrize("fields", [{"nbits": 4}, {"nbits": 2}, *WHOLE], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hessian_lowers_the_error_of_the_outputs_and_keeps_the_format(fields, dtype):
    weight, hessian, method = random_weight().to(dtype), second_moment(), HQQMethod()
    spec = HQQSpec(group_size=GROUP, **fields)
    errors = []
    for given in (None, hessian):
        quantized = method.quantize(weight, spec, hessian=given)
        quantized.check("layer")
        assert quantized.spec == spec
        dense = method.dequantize(quantized)
        errors.append(output_error(weight.float(), dense, hessian))
        if spec.integer_zero:
            assert torch.equal(quantized.tensors["zero"], quantized.tensors["zero"].round())
    assert errors[1] < 0.6 * errors[0]


def test_a_weight_on_the_grid_stays_there():
    method, spec = HQQMethod(), HQQSpec(nbits=3, group_size=GROUP)
    first = method.quantize(random_weight(), spec)
    dense = method.dequantize(first)
    for hessian in (None, second_moment()):
        again = method.quantize(dense, spec, hessian=hessian, start=first)
        assert torch.equal(again.tensors["W_q"], first.tensors["W_q"])
        torch.testing.assert_close(again.tensors["scale"], first.tensors["scale"], rtol=2e-3, atol=0)


@pytest.mark.parametrize(
    ("hessian", "message"),
    [
        (torch.eye(IN - 1), r"shape \(192, 192\)"),
        (torch.eye(IN).double(), "float32"),
        (torch.zeros(IN, IN), "never seen"),
        (torch.full((IN, IN), torch.nan), "NaN"),
    ],
    ids=["shape", "dtype", "zero", "nan"],
)
def test_a_hessian_that_makes_no_sense_is_refused(hessian, message):
    with pytest.raises(ValueError, match=message):
        HQQMethod().quantize(random_weight(), HQQSpec(), hessian=hessian)


def test_groups_across_the_outputs_cannot_be_calibrated_and_say_so():
    with pytest.raises(NotImplementedError, match="axis=1"):
        HQQMethod().quantize(random_weight(), HQQSpec(axis=0, group_size=8), hessian=second_moment())
