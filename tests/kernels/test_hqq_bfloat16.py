"""Products of bfloat16 inputs as they are, on CPUs with an extension for them: as exact as in float32."""

import pytest
import torch
from test_hqq_cpu import METADATA_DTYPES
from test_hqq_op import random_weight
from torch import Tensor

from quantlayers_kernels import native
from quantlayers_kernels.bitpack import SUPPORTED_NBITS
from quantlayers_kernels.hqq import cpu
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference
from quantlayers_kernels.interface import IN_FLOAT32

pytestmark = pytest.mark.skipif(
    not native.has_bfloat16_products(), reason="this CPU has no products of bfloat16 besides AMX's"
)
# (out_features, in_features, n_groups): groups of 64, rows that blocks do not divide, slots that windows do not divide
# or are shorter than one, one group, groups that windows do not divide; groups of several to a window.
SHAPES = [(9, 576, 9), (64, 1024, 16), (6, 1152, 1), (5, 960, 10), (11, 768, 8), (3, 100, 1), (7, 512, 32)]
TOKENS = [1, 2, 3, 4, 7, 16]


@pytest.fixture
def in_float32(monkeypatch):
    """Computes in float32 what is called with it."""

    def call(*arguments, **options) -> Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(native, "choice", lambda: native.variant() | IN_FLOAT32)
            return cpu.linear_few_tokens(*arguments, **options)

    return call


def assert_close(y: Tensor, truth: Tensor, size: Tensor) -> None:
    """Rounded to bfloat16 from a float32 sum of numbers of altogether ``size``."""
    assert y.dtype == torch.bfloat16
    assert ((y.double() - truth).abs() <= 2**-8 * 1.001 * truth.abs() + 6e-7 * size).all()


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_a_product_is_the_true_one_rounded_once(nbits):
    torch.manual_seed(nbits)
    for i, shape in enumerate(SHAPES):
        weight = random_weight(nbits, 1, shape, METADATA_DTYPES[i % len(METADATA_DTYPES)])
        dense = dequantize_hqq_reference(*weight, nbits=nbits, axis=1, in_features=shape[1]).double()
        for n_tokens in TOKENS:
            x, bias = (torch.randn(n_tokens, shape[1]) + 0.5).bfloat16(), torch.randn(shape[0])
            for its in (bias, None):
                y = cpu.linear_few_tokens(x, *weight, its, nbits=nbits)
                truth = x.double() @ dense.T + (0 if its is None else its.double())
                size = x.double().norm(dim=1, p=1)[:, None] * 2**nbits * weight[1].double().amax(1) + bias.abs()
                assert_close(y, truth, size)


@pytest.mark.parametrize("nbits", [1, 2, 3, 4, 5])
def test_the_extension_is_what_computes_it(nbits, in_float32):
    """It takes subnormal inputs for zeros."""
    x = torch.full((1, 576), 1e-39).bfloat16()
    W_q, scale, zero = random_weight(nbits, 1, (8, 576, 9))
    weight = W_q, scale, torch.zeros_like(zero)
    assert not cpu.linear_few_tokens(x, *weight, None, nbits=nbits).any()
    assert in_float32(x, *weight, None, nbits=nbits).all()


@pytest.mark.parametrize("nbits", [2, 3, 4])
def test_the_bits_do_not_depend_on_threads_or_on_the_tokens_beside(nbits):
    weight = random_weight(nbits, 1, (203, 1152, 18))
    x, threads = torch.randn(7, 1152).bfloat16(), torch.get_num_threads()
    found = []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            found.append(cpu.linear_few_tokens(x, *weight, None, nbits=nbits))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(each, found[0]) for each in found)
    each = [cpu.linear_few_tokens(token[None], *weight, None, nbits=nbits) for token in x]
    assert torch.equal(torch.cat(each), found[0])


def test_zeros_far_from_the_codes_cost_no_more_than_the_rounding():
    W_q, scale, zero = random_weight(4, 1, (8, 576, 9))
    zero = zero - 1000
    x = (torch.randn(2, 576) + 0.5).bfloat16()
    dense = dequantize_hqq_reference(W_q, scale, zero, nbits=4, axis=1, in_features=576).double()
    size = x.double().norm(dim=1, p=1)[:, None] * 1000 * scale.double().amax(1)
    assert_close(cpu.linear_few_tokens(x, W_q, scale, zero, None, nbits=4), x.double() @ dense.T, size)


def test_large_inputs_overflow_no_sooner_than_in_float32_and_none_that_is_not_finite_gets_lost(in_float32):
    weight = random_weight(4, 1, (8, 576, 9))
    x = torch.zeros(1, 576)
    x[0, ::64] = 3e36
    y = cpu.linear_few_tokens(x.bfloat16(), *weight, None, nbits=4)
    assert torch.isfinite(y).all()
    torch.testing.assert_close(y, in_float32(x.bfloat16(), *weight, None, nbits=4), rtol=1e-2, atol=1e33)
    for value in (torch.inf, -torch.inf, torch.nan):
        x = torch.randn(2, 576).bfloat16()
        x[1, 100] = value
        y, expected = (call(x, *weight, None, nbits=4) for call in (cpu.linear_few_tokens, in_float32))
        assert torch.isfinite(y[0]).all()
        assert torch.equal(y.nan_to_num(), expected.nan_to_num())
        assert torch.equal(y.isnan(), expected.isnan())


def test_the_environment_chooses_float32(monkeypatch):
    monkeypatch.setattr(native, "is_float32_chosen", lambda: True)
    assert not native.has_bfloat16_products()
    assert native.choice() == native.variant() | IN_FLOAT32
