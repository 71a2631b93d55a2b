"""Products with activations rounded to 8 bits against the reference that defines them, on every instruction set."""

import functools

import pytest
import torch
import torch.nn.functional as F
from implementations import COMPILED, run_with
from test_hqq_cpu import METADATA_DTYPES, SHAPES, TOKENS
from test_hqq_op import random_weight

from quantlayers_kernels import native
from quantlayers_kernels.bitpack import SUPPORTED_NBITS
from quantlayers_kernels.hqq import cpu
from quantlayers_kernels.hqq.integer_reference import BLOCK, integer_linear_reference, rounded_activations
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference

# In csrc/quantlayers.h: the kernels of a CPU without the extension for products of bytes.
WITHOUT_EXTENSIONS = 16
# Besides the shapes of the exact kernels: slots that do not divide, groups that blocks do not divide, one group.
MORE_SHAPES = [(9, 576, 9), (6, 576, 1), (11, 768, 8), (5, 1536, 12), (4, 960, 10), (5, 100, 1), (13, 512, 4)]
EACH_SHAPE = SHAPES + MORE_SHAPES


@pytest.fixture(params=[*COMPILED, *(f"{each} without extensions" for each in COMPILED[1:])], autouse=True)
def kernels(request, monkeypatch) -> str:
    name = request.param.split()[0]
    run_with(name, monkeypatch)
    if "without" in request.param:
        monkeypatch.setattr(native, "variant", lambda: native.VARIANTS.index(name) + WITHOUT_EXTENSIONS)
    return request.param


def product(x, W_q, scale, zero, bias=None, *, nbits):
    return cpu.linear_few_tokens(x, W_q, scale, zero, bias, nbits=nbits, activation_bits=8)


@functools.cache
def products(nbits: int) -> list[tuple]:
    """Of each shape and number of tokens: the arguments of :func:`product`, and the reference's result, which is slow
    and the same for all kernels."""
    torch.manual_seed(0)
    found = []
    for i, shape in enumerate(EACH_SHAPE):
        weight = random_weight(nbits, 1, shape, METADATA_DTYPES[i % 3])
        bias = torch.randn(shape[0])
        for n_tokens in TOKENS:
            x = torch.randn(n_tokens, shape[1]) * torch.rand(n_tokens, 1) + 0.5
            found.append(((x, *weight, bias), integer_linear_reference(x, *weight, bias, nbits=nbits)))
    return found


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_the_product_is_that_of_the_rounded_activations(nbits):
    """Up to float32's rounding of the scales and of the sums over blocks; one code more or less would be many times as
    much."""
    for (x, W_q, scale, zero, bias), truth in products(nbits):
        y = product(x, W_q, scale, zero, bias, nbits=nbits)
        size = x.double().norm(dim=1, p=1)[:, None] * 2**nbits * scale.double().amax(1) + bias.abs()
        assert ((y - truth).abs() <= 6e-7 * size).all(), (W_q.shape, scale.shape, len(x))


def test_whole_numbers_come_out_without_any_rounding():
    """Activations that are their own codes, scales of 1 and whole zero points: sums of integers, exact in float32."""
    for nbits in SUPPORTED_NBITS:
        for out_features, in_features, n_groups in EACH_SHAPE:
            W_q, scale, zero = random_weight(nbits, 1, (out_features, in_features, n_groups))
            scale, zero = torch.ones_like(scale), zero.round()
            size = in_features // n_groups
            for n_tokens in (1, 5):
                x = torch.randint(-127, 128, (n_tokens, n_groups, size)).float()
                x[:, :, ::BLOCK] = 127.0  # the largest of every block
                x = x.view(n_tokens, in_features)
                weight = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=1, in_features=in_features)
                truth = F.linear(x.double(), weight.double())
                assert torch.equal(product(x, W_q, scale, zero, nbits=nbits).double(), truth), (nbits, in_features)


def test_codes_are_rounded_to_the_nearest_and_to_even_between_two():
    """Halves and their neighbours; the product with a weight that has one code of 1 in each row shows each code."""
    x = torch.arange(-126.5, 127, 1.0)
    x = torch.stack([x, torch.nextafter(x, torch.tensor(200.0)), torch.nextafter(x, torch.tensor(-200.0))])
    x = F.pad(F.pad(x, (0, 1), value=127.0).view(3, -1, BLOCK - 1), (0, 1), value=127.0).flatten(1)
    n_groups = x.shape[1] // BLOCK
    codes, scale = rounded_activations(x, n_groups)
    assert torch.equal(codes.flatten(1).float(), x.round())
    assert (scale == 1).all()
    W_q, ones = torch.eye(x.shape[1], dtype=torch.uint8), torch.ones(x.shape[1], n_groups)
    assert torch.equal(product(x, W_q, ones, 0 * ones, nbits=8), x.round())
    # with a scale that is no power of two, where a product and an addition that are fused would round otherwise
    x = torch.randn(50, x.shape[1])
    codes, scale = rounded_activations(x, n_groups)
    y = product(x, W_q, ones, 0 * ones, nbits=8)
    torch.testing.assert_close(y, (codes * scale).flatten(1), rtol=0, atol=4e-3)  # a step is 0.015


def test_the_largest_codes_and_activations_do_not_overflow():
    for nbits in SUPPORTED_NBITS:
        for out_features, in_features, n_groups in ((5, 1024, 16), (4, 1024, 1), (5, 576, 9), (5, 100, 1)):
            packed = random_weight(nbits, 1, (out_features, in_features, n_groups))[0].fill_(255)
            scale = torch.ones(out_features, n_groups)
            for sign in (1.0, -1.0):
                x = torch.full((5, in_features), 127 * sign)
                y = product(x, packed, scale, 0 * scale, nbits=nbits)
                assert (y == 127 * sign * (2**nbits - 1) * in_features).all()


@pytest.mark.parametrize("n_tokens", [1, 3, 6])
def test_an_input_that_is_not_finite_gives_nan_in_its_token_alone(n_tokens):
    for nbits, in_features, n_groups in ((4, 64, 2), (4, 576, 9), (3, 576, 9), (8, 512, 1), (2, 2048, 128)):
        W_q, scale, zero = random_weight(nbits, 1, (9, in_features, n_groups))
        for bad in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            x = torch.randn(n_tokens, in_features)
            x[0, 37] = bad
            y = product(x, W_q, scale, zero, nbits=nbits)
            assert y[0].isnan().all()
            assert y[1:].isfinite().all()


def test_zeros_and_the_smallest_and_largest_numbers():
    W_q, scale, zero = random_weight(4, 1, (9, 576, 9))
    bias = torch.randn(9)
    for size in (0.0, -0.0, 1e-45, 1e-38, 1e-31, 2.0**-100):
        assert torch.equal(product(torch.full((2, 576), size), W_q, scale, zero, bias, nbits=4), bias.expand(2, 9))
    for size in (2.0**-99, 1e30):
        x = size * torch.randn(2, 576)
        truth = integer_linear_reference(x, W_q, scale, zero, None, nbits=4)
        torch.testing.assert_close(product(x, W_q, scale, zero, nbits=4).double(), truth, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("nbits", [2, 3, 4, 8])
def test_each_token_has_the_bits_that_it_has_alone_whatever_lies_beside_the_arguments(nbits):
    for shape in ((9, 512, 8), (5, 576, 9), (7, 1024, 64), (6, 100, 5)):
        arguments = random_weight(nbits, 1, shape)
        x = torch.randn(19, shape[1])
        alone = torch.cat([product(row[None], *arguments, nbits=nbits) for row in x])
        guarded = []
        for part in (x, *arguments):
            memory = torch.full((3, part.numel()), 255 if part.dtype == torch.uint8 else torch.nan, dtype=part.dtype)
            memory[1] = part.flatten()
            guarded.append(memory[1].view(part.shape))
        assert torch.equal(product(*guarded, nbits=nbits), alone)


def test_half_precision_inputs_and_strides():
    W_q, scale, zero = random_weight(4, 1, (9, 64, 2), torch.float16)
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.randn(64, 6)[:, ::2].t().to(dtype)
        y = product(x, W_q, scale, zero, nbits=4)
        assert y.dtype == dtype
        assert torch.equal(y, product(x.float().contiguous(), W_q, scale, zero, nbits=4).to(dtype))


@pytest.mark.parametrize("n_threads", [2, 5])
def test_any_number_of_threads_gives_the_same_bits(n_threads):
    W_q, scale, zero = random_weight(4, 1, (203, 256, 4))
    inputs = [torch.randn(n_tokens, 256) for n_tokens in (1, 13)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = [product(x, W_q, scale, zero, nbits=4) for x in inputs]
        torch.set_num_threads(n_threads)
        for x, y in zip(inputs, expected, strict=True):
            assert torch.equal(product(x, W_q, scale, zero, nbits=4), y)
    finally:
        torch.set_num_threads(before)


def test_the_error_is_that_of_eight_bits():
    """Rounding adds a variance of a twelfth of a squared step: for normal numbers about 0.45 % of the product."""
    W_q, scale, zero = random_weight(4, 1, (64, 1024, 16))
    x = torch.randn(32, 1024)
    exact = F.linear(x, dequantize_hqq_reference(W_q, scale, zero, nbits=4, axis=1, in_features=1024))
    error = (product(x, W_q, scale, zero, nbits=4) - exact).norm() / exact.norm()
    assert 0.003 < error < 0.006
