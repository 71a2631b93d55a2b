"""Error feedback: the codes of GPTQ, and with the sweeps after it never worse than GPTQ or than rounding alone."""

import pytest
import torch
from torch import Tensor

from peft_quantlayers.methods import get_method
from peft_quantlayers.methods.error_feedback import round_with_feedback, upper_factor
from peft_quantlayers.methods.hqq import HQQSpec
from peft_quantlayers.methods.nf4 import NF4Spec

OUT, IN, GROUP = 24, 192, 32
SPECTRA = {
    "flat": torch.ones(IN),
    "1/k": 1 / torch.arange(1, IN + 1),
    "1/k^2": 1 / torch.arange(1, IN + 1.0) ** 2,
    "exponential": torch.exp(-torch.arange(IN) / 6),
}
SPECS = {  # By hand: every kind of grid that error feedback rounds to.
    **{f"hqq {nbits} bits": HQQSpec(nbits=nbits, group_size=GROUP) for nbits in (4, 3, 2)},
    "hqq integer zeros": HQQSpec(nbits=3, group_size=GROUP, integer_zero=True),
    "hqq symmetric": HQQSpec(nbits=3, group_size=GROUP, symmetric=True),
    "nf4": NF4Spec(block_size=GROUP),
}


def second_moment(spectrum: str, damping: float = 1e-4) -> Tensor:
    """Of inputs whose directions are random, and whose energies fall off like the spectrum: ill-conditioned."""
    values = SPECTRA[spectrum].double()
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=torch.Generator().manual_seed(1)).double())[0]
    moment = (basis * values) @ basis.t()
    return (moment + damping * moment.diagonal().mean() * torch.eye(IN)).float()


def random_weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0)) * 0.02


def error(difference: Tensor, hessian: Tensor) -> float:
    difference = difference.double()
    return float(((difference @ hessian.double()) * difference).sum())


def gptq(weight: Tensor, hessian: Tensor, *, nbits: int, act_order: bool) -> Tensor:
    """Frantar et al. 2022 as published: the inverse's factor, min/max grids of updated groups, 1 % damping."""
    weight, inverse = weight.double().clone(), hessian.double().clone()
    inverse.diagonal().add_(0.01 * inverse.diagonal().mean())
    order = inverse.diagonal().argsort(descending=True) if act_order else torch.arange(IN)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inverse[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)

    def grid(groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / (2**nbits - 1)
        return scale, (-low / scale).round()

    scales, zeros = grid(weight.view(OUT, -1, GROUP))
    weight, found = weight[:, order], torch.empty_like(weight)
    for at, column in enumerate(order.tolist()):
        group = column // GROUP
        if not act_order and at % GROUP == 0:
            scales[:, group], zeros[:, group] = grid(weight[:, at : at + GROUP])
        scale, zero = scales[:, group], zeros[:, group]
        rounded = ((weight[:, at] / scale + zero).round().clamp(0, 2**nbits - 1) - zero) * scale
        found[:, column] = rounded
        weight[:, at + 1 :] -= ((weight[:, at] - rounded) / factor[at, at])[:, None] * factor[at, at + 1 :]
    return found.float()


def on_integers(target: Tensor, column: int) -> Tensor:
    return (target * 100).round() / 100


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_on_one_grid_the_values_are_those_of_gptq(spectrum, act_order):
    weight, hessian = random_weight(), second_moment(spectrum, damping=0.01)
    found = torch.empty_like(weight)

    def rounded(target: Tensor, column: int) -> Tensor:
        found[:, column] = on_integers(target, column)
        return found[:, column]

    round_with_feedback(weight, hessian, rounded, act_order=act_order)
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(IN)
    left, expected = weight.double()[:, order], torch.empty_like(weight)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()[order][:, order]))
    factor = torch.linalg.cholesky(inverse, upper=True)
    for at, column in enumerate(order.tolist()):
        value = on_integers(left[:, at], column)
        expected[:, column] = value
        left[:, at + 1 :] -= ((left[:, at] - value) / factor[at, at])[:, None] * factor[at, at + 1 :]
    assert float((found - expected).abs().gt(1e-6).float().mean()) < 0.02  # ties in float32, and what follows them
    assert error(found - weight, hessian) < 1.02 * error(expected - weight, hessian)


@pytest.mark.parametrize("initial_codes", ["error_feedback", "act_order"])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_no_worse_than_plain_rounding_or_gptq_on_ill_conditioned_moments(spec, spectrum, initial_codes):
    weight, hessian, method = random_weight(), second_moment(spectrum), get_method(spec.method)
    quantized = method.quantize(weight, spec, hessian=hessian, initial_codes=initial_codes)
    quantized.check("layer")
    found = error(method.dequantize(quantized) - weight, hessian)
    plain = error(method.dequantize(method.quantize(weight, spec)) - weight, hessian)
    assert found <= 1.001 * plain
    if spec.method == "hqq" and not spec.symmetric:
        act_order = initial_codes == "act_order"
        assert found < error(gptq(weight, hessian, nbits=spec.nbits, act_order=act_order) - weight, hessian)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_sweeps_from_nearest_codes_end_far_above_it(spec):
    weight, hessian, method = random_weight(), second_moment("1/k^2"), get_method(spec.method)
    errors = {
        name: error(
            method.dequantize(method.quantize(weight, spec, hessian=hessian, initial_codes=name)) - weight, hessian
        )
        for name in method.initial_codes
    }
    assert errors["act_order"] < 0.75 * errors["nearest"]


@pytest.mark.parametrize("initial_codes", ["error_feedback", "act_order"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_singular_moment_and_a_single_row_are_no_problem(spec, initial_codes):
    x = torch.randn(5, IN, generator=torch.Generator().manual_seed(3))
    hessian, method, weight = x.t() @ x / 5, get_method(spec.method), random_weight()[:1]
    quantized = method.quantize(weight, spec, hessian=hessian, initial_codes=initial_codes)
    nearest = method.quantize(weight, spec, hessian=hessian)
    scale = error(weight, hessian)
    assert (
        error(method.dequantize(quantized) - weight, hessian)
        < 1.5 * error(method.dequantize(nearest) - weight, hessian) + 1e-3 * scale
    )


def test_rows_do_not_depend_on_each_other():
    weight, hessian, method = random_weight(), second_moment("1/k"), get_method("hqq")
    spec = SPECS["hqq 3 bits"]
    whole = method.quantize(weight, spec, hessian=hessian, initial_codes="act_order")
    part = method.quantize(weight[::3], spec, hessian=hessian, initial_codes="act_order")
    assert (whole.codes()[::3] != part.codes()).float().mean() < 0.01


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_factor_is_one_of_the_moment(spectrum):
    hessian = second_moment(spectrum, damping=0.01)
    factor = upper_factor(hessian).double()
    assert torch.equal(factor, factor.triu())
    assert torch.equal(factor.diagonal(), torch.ones(IN, dtype=torch.float64))
    inverse = torch.linalg.inv(factor)
    middle = inverse @ hessian.double() @ inverse.t()
    torch.testing.assert_close(middle, torch.diag(middle.diagonal()), rtol=0, atol=1e-4 * float(middle.max()))
