"""Whole zero points: within the codes, never worse than plain rounding, and each group solved alone."""

import pytest
import torch

from quantlayers_kernels.hqq.solve_reference import encode
from quantlayers_kernels.hqq.solve_whole_zeros import solve_whole_zeros

WIDTHS = [(nbits, symmetric) for nbits in (1, 2, 3, 4, 8) for symmetric in (False, True) if nbits > 1 or not symmetric]
every_kind = pytest.mark.parametrize(("nbits", "is_symmetric"), WIDTHS)


def random_groups(n_groups: int, size: int, std: float = 0.02) -> torch.Tensor:
    return std * torch.randn(n_groups, size, generator=torch.Generator().manual_seed(0))


def rebuilt(groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, nbits: int) -> torch.Tensor:
    return (encode(groups, scale, zero, max_code=2**nbits - 1) - zero) * scale


def plain_rounding(groups: torch.Tensor, nbits: int, is_symmetric: bool) -> torch.Tensor:
    """The range divided into equal steps, and the zero point rounded, as other packages do without data."""
    low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
    scale = (high - low) / (2**nbits - 1)
    zero = (-low / scale).round()
    if is_symmetric:
        scale, zero = groups.abs().amax(1, keepdim=True) / (2 ** (nbits - 1) - 1), torch.tensor(2.0 ** (nbits - 1))
    return rebuilt(groups, scale, zero, nbits)


@every_kind
@pytest.mark.parametrize("mean", [0.0, 0.1, -5.0])
def test_zeros_are_whole_codes_and_groups_of_one_value_exact(nbits, is_symmetric, mean):
    groups = random_groups(50, 32) + mean
    for row, value in enumerate((0.0, 0.5, -0.5, 1e-38, -3e38)):
        groups[row] = value
    before = groups.clone()
    scale, zero = solve_whole_zeros(groups, nbits=nbits, is_symmetric=is_symmetric)
    assert torch.equal(groups, before)
    assert scale.shape == zero.shape == (50, 1)
    assert torch.equal(zero, zero.round())
    if is_symmetric:
        assert (zero == 2 ** (nbits - 1)).all()
    else:
        assert zero.min() >= 0
        assert zero.max() <= 2**nbits - 1
        assert (scale > 0).all()
    assert scale.isfinite().all()
    assert torch.equal(rebuilt(groups, scale, zero, nbits)[:5], groups[:5])


@every_kind
@pytest.mark.parametrize("std", [1e-25, 0.02, 1e25])
def test_the_error_is_below_that_of_plain_rounding(nbits, is_symmetric, std):
    groups = random_groups(200, 64) * (std / 0.02)
    groups[:20, 3] *= 8  # with an outlier
    groups[20:40] = groups[20:40].abs()
    plain = ((plain_rounding(groups, nbits, is_symmetric) - groups) / std).square().sum(1)
    for importance in (torch.ones(1, 1), None):
        scale, zero = solve_whole_zeros(groups, nbits=nbits, is_symmetric=is_symmetric, importance=importance)
        error = ((rebuilt(groups, scale, zero, nbits) - groups) / std).square().sum(1)
        assert error.sum() < 0.97 * plain.sum()
        if importance is not None:
            assert (error <= 1.0001 * plain).all()


def test_without_data_large_weights_are_clipped_less_and_outputs_shrink_less():
    groups = random_groups(2000, 64)
    clipped, shrunk = [], []
    for importance in (torch.ones(1, 1), None):
        scale, zero = solve_whole_zeros(groups, nbits=4, importance=importance)
        dense = rebuilt(groups, scale, zero, 4)
        is_large = groups.abs() > 2.5 * 0.02
        clipped.append(float((dense - groups)[is_large].square().mean()))
        shrunk.append(1 - float((dense * groups).sum() / groups.square().sum()))
    assert clipped[1] < 0.8 * clipped[0]
    assert shrunk[1] < 0.8 * shrunk[0]


@every_kind
def test_a_group_is_solved_alone(nbits, is_symmetric):
    groups = random_groups(32, 64)
    scale, zero = solve_whole_zeros(groups, nbits=nbits, is_symmetric=is_symmetric)
    alone = [solve_whole_zeros(group[None], nbits=nbits, is_symmetric=is_symmetric) for group in groups]
    torch.testing.assert_close(scale, torch.cat([each[0] for each in alone]), rtol=1e-6, atol=0)
    assert torch.equal(zero, torch.cat([each[1] for each in alone]))


@every_kind
def test_importance_lowers_the_weighted_error(nbits, is_symmetric):
    groups, importance = random_groups(200, 64), torch.rand(1, 64).pow(4) + 1e-3
    errors = []
    for given in (None, importance):
        scale, zero = solve_whole_zeros(groups, nbits=nbits, is_symmetric=is_symmetric, importance=given)
        errors.append(((rebuilt(groups, scale, zero, nbits) - groups).square() * importance).sum())
    assert errors[1] < errors[0]


def test_the_side_with_the_larger_weights_gets_the_code_more():
    groups = torch.tensor([[0.7, -0.1, 0.3, 0.0], [-0.7, 0.1, -0.3, 0.0]])
    scale, zero = solve_whole_zeros(groups, nbits=2, is_symmetric=True)
    assert scale[0] < 0 < scale[1]
    torch.testing.assert_close(rebuilt(groups, scale, zero, 2)[0], -rebuilt(groups, scale, zero, 2)[1])
