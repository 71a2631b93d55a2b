"""Choosing HQQ codes: the compiled kernel against the definition in torch, and both against what single moves gain."""

import pytest
import torch
from conftest import COMPILED

from quantlayers_kernels import native
from quantlayers_kernels.hqq.choice import chosen_in_columns

every_instruction_set = pytest.mark.parametrize("kernels", COMPILED, indirect=True)


def random_problem(out_features: int, columns: int, max_code: int, seed: int = 0):
    """correlation, codes, steps, hessian"""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(columns, columns, generator=generator) + torch.randn(columns, 1, generator=generator)
    hessian = inputs.t() @ inputs / columns + 0.05 * torch.eye(columns)
    steps = 0.5 + torch.rand(out_features, columns, generator=generator)
    codes = torch.randint(0, max_code + 1, (out_features, columns), generator=generator).float()
    wrong = steps * torch.randn(out_features, columns, generator=generator)
    return wrong @ hessian, codes, steps, hessian


def gain(codes, correlation, before, steps, hessian) -> torch.Tensor:
    """By how much each row's error changes when its codes go from ``before`` to ``codes``, float64."""
    moved = (codes - before).double() * steps.double()
    return ((moved @ hessian.double() - 2 * correlation.double()) * moved).sum(1)


@every_instruction_set
@pytest.mark.parametrize("max_code", [1, 3, 15, 255])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (64, 96), (130, 33)], ids=str)
def test_the_compiled_kernel_chooses_as_plain_torch_does(shape, max_code, kernels, monkeypatch):
    arguments = random_problem(*shape, max_code)
    before = [argument.clone() for argument in arguments]
    for sweeps in (1, 3):
        found = chosen_in_columns(*arguments, max_code=max_code, sweeps=sweeps)
        with monkeypatch.context() as patch:
            patch.setattr(native, "library", lambda: None)
            plain = chosen_in_columns(*arguments, max_code=max_code, sweeps=sweeps)
        assert all(torch.equal(*pair) for pair in zip(arguments, before, strict=True))
        assert torch.equal(found, found.round().clamp(0, max_code))
        # A tie may fall either way, and what follows in that row is another way down.
        assert (found == plain).all(1).float().mean() > 0.9
        correlation, codes, steps, hessian = arguments
        ours, theirs = (gain(each, correlation, codes, steps, hessian) for each in (found, plain))
        assert (ours <= 0).all()
        torch.testing.assert_close(ours.sum(), theirs.sum(), rtol=0.02, atol=1e-6)


@every_instruction_set
def test_after_enough_sweeps_no_single_code_can_do_better(kernels):
    correlation, codes, steps, hessian = random_problem(40, 70, 7)
    found = chosen_in_columns(correlation, codes, steps, hessian, max_code=7, sweeps=50)
    rest = correlation - (found - codes) * steps @ hessian
    for direction in (-1.0, 1.0):
        worth = 2 * direction * steps * rest - steps.square() * hessian.diagonal()
        moved = found + direction
        assert (worth[(moved >= 0) & (moved <= 7)] < 1e-3).all()


@every_instruction_set
@pytest.mark.parametrize("n_threads", [1, 5])
def test_rows_do_not_depend_on_each_other_or_on_the_threads(kernels, n_threads):
    correlation, codes, steps, hessian = random_problem(200, 48, 3)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        whole = chosen_in_columns(correlation, codes, steps, hessian, max_code=3, sweeps=2)
    finally:
        torch.set_num_threads(before)
    parts = [
        chosen_in_columns(correlation[rows], codes[rows], steps[rows], hessian, max_code=3, sweeps=2)
        for rows in (slice(0, 7), slice(7, 200))
    ]
    assert torch.equal(whole, torch.cat(parts))


def test_shapes_that_contradict_each_other_are_refused():
    correlation, codes, steps, hessian = random_problem(4, 6, 3)
    with pytest.raises(ValueError, match=r"hessian has the shape \(5, 5\)"):
        chosen_in_columns(correlation, codes, steps, hessian[:5, :5], max_code=3, sweeps=1)
    with pytest.raises(ValueError, match=r"steps has the shape \(4, 5\)"):
        chosen_in_columns(correlation, codes, steps[:, :5], hessian, max_code=3, sweeps=1)
    with pytest.raises(ValueError, match="one device"):
        chosen_in_columns(correlation, codes.to("meta"), steps, hessian, max_code=3, sweeps=1)


def test_no_columns_are_no_work():
    none = torch.empty(4, 0)
    assert chosen_in_columns(none, none, none, torch.empty(0, 0), max_code=3, sweeps=1).shape == (4, 0)
