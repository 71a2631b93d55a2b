"""What is fitted to a second moment has the same bits with one thread and with several."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from peft_quantlayers.calibration.asymmetric_targets import asymmetric_target
from peft_quantlayers.calibration.statistics import PairedInput, collect
from peft_quantlayers.methods import get_method
from peft_quantlayers.methods.any_threads import cholesky_, sum_of_all
from peft_quantlayers.methods.error_feedback import upper_factor
from peft_quantlayers.methods.hqq import HQQSpec
from peft_quantlayers.methods.least_squares import conjugate_gradient


def with_threads(compute: Callable[[], Tensor]) -> list[Tensor]:
    """The same with one to four threads."""
    before, found = torch.get_num_threads(), []
    try:
        for n_threads in range(1, 5):
            torch.set_num_threads(n_threads)
            found.append(compute())
    finally:
        torch.set_num_threads(before)
    return found


def is_same(found: list[Tensor]) -> bool:
    return all(torch.equal(found[0], other) for other in found[1:])


def moment(n: int) -> Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(n))
    return x.t() @ x / len(x)


@pytest.mark.parametrize("n", [1, 100, 128, 192, 300, 576])
def test_a_factor_is_that_of_float64(n):
    matrix = moment(n)
    found = matrix.clone()
    assert cholesky_(found)
    found.tril_()
    expected = torch.linalg.cholesky(matrix.double())
    error, own = ((each.double() - expected).abs().max() for each in (found, torch.linalg.cholesky(matrix)))
    assert error <= 2 * own + 1e-12


def test_what_has_no_factor_says_so():
    matrix = moment(300)
    for at in (0, 200):
        broken = matrix.clone()
        broken[at, at] = -1
        assert not cholesky_(broken)
    assert not cholesky_(matrix * torch.nan)


@pytest.mark.parametrize("n", [192, 320, 576])
def test_factors_and_sums_have_the_same_bits(n):
    matrix, x = moment(n), torch.randn(3, 7, 100 * n, generator=torch.Generator().manual_seed(0))

    def factor() -> Tensor:
        found = matrix.clone()
        assert cholesky_(found)
        return found

    assert is_same(with_threads(factor))
    assert is_same(with_threads(lambda: sum_of_all(x)))
    torch.testing.assert_close(sum_of_all(x).double(), x.double().sum(), rtol=1e-5, atol=1e-2)
    assert sum_of_all(torch.tensor(2.0)) == 2


@pytest.mark.parametrize("initial_codes", ["nearest", "error_feedback"])
def test_a_layer_with_an_asymmetric_target_has_the_same_bits(initial_codes):
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2048, 256, generator=generator), torch.randn(8, 256, 256, generator=generator)
    moved = torch.eye(256) + 0.02 * torch.randn(256, 256, generator=generator)
    pairs = [PairedInput(each, each @ moved) for each in x]
    statistics = collect(pairs, ("second_moment", "deviation_moment", "first_half"))
    assert statistics is not None
    hessian, spec = statistics.hessian(damping=0.01), HQQSpec(nbits=3, group_size=16)

    def quantized() -> Tensor:
        target = asymmetric_target(weight, statistics)
        assert target is not None
        found = get_method("hqq").quantize(target, spec, hessian=hessian, initial_codes=initial_codes)
        return torch.cat([tensor.flatten().float() for tensor in found.tensors.values()])

    assert is_same(with_threads(quantized))


def test_what_the_solvers_use_has_the_same_bits():
    residual = torch.randn(2, 4096, 16, generator=torch.Generator().manual_seed(0))
    scale = 1 + torch.rand(residual.shape, generator=torch.Generator().manual_seed(1))
    ones = torch.ones_like(residual)
    assert is_same(with_threads(lambda: conjugate_gradient(lambda x: x * scale, residual, ones, iters=4)))
    matrix = moment(320)
    assert is_same(with_threads(lambda: upper_factor(matrix)))
