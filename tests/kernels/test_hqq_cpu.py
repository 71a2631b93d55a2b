"""The compiled HQQ kernels against the reference and a float64 truth, on every instruction set."""

import functools
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPILED
from test_hqq_op import assert_as_exact_as, dense_weight, random_weight

from quantlayers_kernels import native, tiled
from quantlayers_kernels.bitpack import SUPPORTED_NBITS
from quantlayers_kernels.hqq import cpu, hqq_linear
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference
from quantlayers_kernels.hqq.tiles import weight_tiles

METADATA_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (out_features, in_features, n_groups): groups of 1, of one vector, with a rest, across planes' segments, of a row;
# and what is decoded in registers: whole windows, groups shorter than a window, windows cut by slots and groups
SHAPES = [(1, 1, 1), (63, 100, 25), (100, 63, 3), (30, 576, 9), (30, 1184, 1), (66, 128, 128), (20, 2048, 16)]
SHAPES += [(9, 512, 8), (7, 1024, 32), (6, 576, 18), (5, 576, 36), (3, 520, 13), (5, 1560, 3)]
# several groups in a window, the last windows over one another
SHAPES += [(9, 1024, 64), (5, 1152, 72), (5, 1024, 128), (6, 2048, 512), (7, 1088, 68)]
TOKENS = (1, 2, 3, 4, 5, 7, 16, 17)

pytestmark = pytest.mark.parametrize("kernels", COMPILED, indirect=True)


@pytest.mark.parametrize("dtype", METADATA_DTYPES, ids=str)
@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_the_error_of_few_tokens_is_at_most_twice_that_of_the_dense_product(nbits, dtype, kernels):
    for out_features, in_features, n_groups in SHAPES:
        W_q, scale, zero = random_weight(nbits, 1, (out_features, in_features, n_groups), dtype)
        bias = torch.randn(out_features)
        weight = dense_weight(W_q, scale.double(), zero.double(), nbits=nbits, axis=1, in_features=in_features)
        # a common offset, as after an activation
        inputs = [torch.randn(n_tokens, in_features) + 0.5 for n_tokens in TOKENS]
        y = torch.cat([cpu.linear_few_tokens(x, W_q, scale, zero, bias, nbits=nbits) for x in inputs])
        x = torch.cat(inputs)
        assert_as_exact_as(y, F.linear(x, weight.float(), bias), F.linear(x.double(), weight, bias.double()))


@pytest.mark.parametrize("axis", [0, 1])
def test_many_tokens_and_the_gradient_go_through_the_compiled_dense_rows(axis, kernels, set_tile_elements):
    W_q, scale, zero = random_weight(3, axis, (60, 63, 3), torch.float16)
    weight = dense_weight(W_q, scale.double(), zero.double(), nbits=3, axis=axis, in_features=63)
    set_tile_elements(7 * 63)
    x, grad = torch.randn(cpu.MAX_TOKENS + 1, 63, requires_grad=True), torch.randn(cpu.MAX_TOKENS + 1, 60)
    y = hqq_linear(x, W_q, scale, zero, None, 3, axis)
    assert_as_exact_as(y, F.linear(x, weight.float()), F.linear(x.double(), weight))
    y.backward(grad)
    assert_as_exact_as(x.grad, grad @ weight.float(), grad.double() @ weight)


@functools.cache
def weights_and_references(nbits: int, axis: int) -> list[tuple]:
    """Of each dtype and shape; the same for all kernels."""
    torch.manual_seed(0)
    found = []
    for dtype, (out_features, in_features, n_groups) in product(METADATA_DTYPES, SHAPES):
        shape = (out_features, in_features, n_groups) if axis == 1 else (n_groups * 2, in_features, n_groups)
        weight = random_weight(nbits, axis, shape, dtype)
        reference = dequantize_hqq_reference(*weight, nbits=nbits, axis=axis, in_features=in_features)
        found.append((weight, {written: reference.to(written) for written in native.WRITTEN}))
    return found


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_dense_rows_are_those_of_the_reference_to_the_bit_and_nothing_else_is_written(nbits, axis, kernels):
    for weight, references in weights_and_references(nbits, axis):
        for written, reference in references.items():
            n_rows, in_features = reference.shape
            for rows in (slice(0, n_rows), slice(n_rows // 2, n_rows)):
                memory = torch.full((2 + (n_rows - rows.start) * in_features,), torch.nan, dtype=written)
                into = memory[1:-1].view(-1, in_features)
                cpu.dequantize_rows(*weight, nbits=nbits, axis=axis, rows=rows, into=into)
                assert torch.equal(into, reference[rows])
                assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize("dtype", METADATA_DTYPES, ids=str)
@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_the_error_of_gradients_of_scales_and_zeros_is_at_most_twice_that_of_the_reference(nbits, dtype, kernels):
    found = []
    for shape in SHAPES:
        W_q, scale, zero = random_weight(nbits, 1, shape, dtype)
        gradient = torch.randn(shape[0], shape[1]) + 0.5

        def through(weight_of, cast, W_q=W_q, metadata=(scale, zero), gradient=gradient):
            leaves = [part.to(cast).requires_grad_() for part in metadata]
            weight = weight_of(W_q, *leaves, nbits=nbits, axis=1, in_features=gradient.shape[1])
            return torch.cat([part.flatten() for part in torch.autograd.grad(weight, leaves, gradient.to(cast))])

        into = torch.full((2, 1 + shape[0], shape[2]), torch.nan)
        first = shape[0] // 2
        for rows in (slice(0, first), slice(first, shape[0])):
            ours = (into[0, 1:], into[1, 1:])
            cpu.metadata_gradient_of_rows(gradient[rows], W_q, scale, zero, nbits=nbits, rows=rows, into=ours)
        assert into[:, 0].isnan().all()
        plain, truth = through(dequantize_hqq_reference, torch.float32), through(dense_weight, torch.float64)
        found.append((into[:, 1:].flatten(), plain, truth))
    assert_as_exact_as(*(torch.cat(parts) for parts in zip(*found, strict=True)))


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_each_input_meets_its_own_weight(nbits, kernels):
    """The product with one input that is 1 is a column of the weight, up to one rounding."""
    for out_features, in_features, n_groups in ((9, 512, 8), (5, 576, 9), (3, 520, 13)):
        W_q, scale, zero = random_weight(nbits, 1, (out_features, in_features, n_groups), torch.float16)
        reference = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=1, in_features=in_features)
        for n_tokens in (1, 4, 7):
            for x in torch.eye(in_features).split(n_tokens)[:: 1 if n_tokens > 1 else 7]:
                y = cpu.linear_few_tokens(x, W_q, scale, zero, None, nbits=nbits)
                torch.testing.assert_close(y, x @ reference.t(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_nothing_beside_the_arguments_counts(nbits, kernels):
    """They lie between NaN, and the codes between others."""
    for shape in SHAPES:
        arguments = random_weight(nbits, 1, shape)
        for n_tokens in (1, 3, 8):
            x = torch.randn(n_tokens, shape[1])
            expected = cpu.linear_few_tokens(x, *arguments, None, nbits=nbits)
            guarded = []
            for part in (x, *arguments):
                memory = torch.full(
                    (3, part.numel()), 255 if part.dtype == torch.uint8 else torch.nan, dtype=part.dtype
                )
                memory[1] = part.flatten()
                guarded.append(memory[1].view(part.shape))
            assert torch.equal(cpu.linear_few_tokens(*guarded, None, nbits=nbits), expected)


def test_special_values_of_half_precision_metadata_are_read_as_torch_reads_them(kernels):
    """Subnormal, largest, infinite and NaN scales."""
    bits = torch.tensor([0, 1, 0x3FF, 0x400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7F80, 0x7FC0], dtype=torch.int32)
    for dtype in (torch.float16, torch.bfloat16):
        scale = torch.cat([bits, bits + 0x8000]).to(torch.uint16).view(dtype).view(1, -1)
        W_q, zero = torch.full((1, scale.shape[1]), 200, dtype=torch.uint8), torch.zeros_like(scale)
        reference = dequantize_hqq_reference(W_q, scale, zero, nbits=8, axis=1, in_features=scale.shape[1])
        for written in native.WRITTEN:
            into = torch.empty_like(reference, dtype=written)
            cpu.dequantize_rows(W_q, scale, zero, nbits=8, axis=1, rows=slice(0, 1), into=into)
            torch.testing.assert_close(into, reference.to(written), rtol=0, atol=0, equal_nan=True)


def test_bfloat16_rows_are_rounded_to_even_as_torch_rounds_them(kernels):
    """Halves of a step above even and odd numbers, and numbers beside them: scales of float32, codes of 1."""
    bits = (torch.arange(-64, 64, dtype=torch.int32) << 15) + torch.tensor([[0], [1], [-1]], dtype=torch.int32)
    scale = torch.cat(
        [bits.flatten() + 0x3F800000, bits.flatten() + 0x7F000000, torch.arange(1, 40, dtype=torch.int32)]
    )
    scale = scale.view(torch.float32).view(1, -1)
    W_q, zero = torch.ones(1, scale.shape[1], dtype=torch.uint8), torch.zeros_like(scale)
    into = torch.empty_like(scale, dtype=torch.bfloat16)
    cpu.dequantize_rows(W_q, scale, zero, nbits=8, axis=1, rows=slice(0, 1), into=into)
    assert torch.equal(into, scale.to(torch.bfloat16))


@pytest.mark.parametrize("axis", [0, 1])
def test_tiles_of_bfloat16_need_no_memory_of_another_dtype(axis, kernels, monkeypatch):
    asked, scratch = [], tiled.scratch

    def watched(*shape, dtype, device):
        asked.append(dtype)
        return scratch(*shape, dtype=dtype, device=device)

    monkeypatch.setattr(tiled, "scratch", watched)
    W_q, scale, zero = random_weight(4, axis, (60, 64, 4), torch.float16)
    reference = dequantize_hqq_reference(W_q, scale, zero, nbits=4, axis=axis, in_features=64)
    for dtype in (torch.bfloat16, torch.float16):
        tiles = weight_tiles(W_q, scale, zero, nbits=4, axis=axis, in_features=64, dtype=dtype)
        assert all(torch.equal(tile, reference[rows].to(dtype)) for rows, tile in tiles)
    assert asked == [torch.bfloat16, torch.float32, torch.float16]


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_an_input_that_is_not_finite_shows_in_every_output_it_reaches(n_tokens, kernels):
    for nbits, in_features in ((4, 64), (4, 576), (3, 576), (8, 512)):
        W_q, scale, zero = random_weight(nbits, 1, (9, in_features, in_features // 32))
        reference = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=1, in_features=in_features)
        for bad in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(n_tokens, in_features)
            x[0, 37] = bad
            y = cpu.linear_few_tokens(x, W_q, scale, zero, None, nbits=nbits)
            assert not y[0].isfinite().any()
            assert torch.equal(y[0].nan_to_num(), F.linear(x, reference)[0].nan_to_num())
            assert y[1:].isfinite().all()


def test_arguments_that_are_not_contiguous_give_the_same_product(kernels):
    W_q, scale, zero = random_weight(4, 1, (9, 64, 4), torch.float16)
    x, bias = torch.randn(64, 6)[:, ::2].t(), torch.randn(18)[::2]
    expected = cpu.linear_few_tokens(x.contiguous(), W_q, scale, zero, bias.contiguous(), nbits=4)
    strided = [part.t().contiguous().t() for part in (W_q, scale, zero)]
    assert not any(part.is_contiguous() for part in (x, bias, *strided))
    assert torch.equal(cpu.linear_few_tokens(x, *strided, bias, nbits=4), expected)
    into = torch.empty(9, 64)
    cpu.dequantize_rows(*strided, nbits=4, axis=1, rows=slice(0, 9), into=into)
    assert torch.equal(into, dequantize_hqq_reference(W_q, scale, zero, nbits=4, axis=1, in_features=64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_inputs_are_computed_in_float32_and_rounded_once(dtype, kernels):
    W_q, scale, zero = random_weight(4, 1, (9, 64, 4), torch.float16)
    x = torch.randn(2, 64).to(dtype)
    expected = cpu.linear_few_tokens(x.float(), W_q, scale, zero, None, nbits=4).to(dtype)
    assert torch.equal(hqq_linear(x, W_q, scale, zero, None, 4, 1), expected)


def test_the_fast_path_is_taken_where_its_predicate_says_so_and_nowhere_else(kernels, monkeypatch):
    W_q, scale, zero = random_weight(4, 1, (9, 64, 4))
    calls = []
    run = native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (calls.append(name), run(name, *arguments)))

    def names(x, W_q, scale, zero, bias=None, axis=1):
        calls.clear()
        hqq_linear(x, W_q, scale, zero, bias, 4, axis)
        return set(calls)

    few, many = torch.randn(2, cpu.MAX_TOKENS // 2, 64), torch.randn(cpu.MAX_TOKENS + 1, 64)
    assert names(few, W_q, scale, zero, torch.randn(9)) == {"ql_hqq_linear"}
    assert names(many, W_q, scale, zero) == {"ql_hqq_dequantize"}
    assert names(torch.randn(0, 64), W_q, scale, zero) == {"ql_hqq_dequantize"}
    assert names(few.double(), W_q, scale, zero) == {"ql_hqq_dequantize"}
    assert names(few, W_q, scale.half(), zero) == set()
    assert names(few, W_q, scale.double(), zero.double()) == set()
    assert names(few, *random_weight(4, 0, (9, 64, 3)), axis=0) == {"ql_hqq_dequantize"}


def test_shapes_that_contradict_each_other_raise_and_never_reach_the_kernels(kernels):
    W_q, scale, zero = random_weight(4, 1, (9, 64, 4))
    x = torch.randn(2, 64)
    wrong = [
        (x[:, :32], W_q, scale, zero, None),
        (x, W_q[:, :16], scale, zero, None),
        (x, W_q, scale[:, :3], zero[:, :3], None),
        (x, W_q, scale[:5], zero[:5], None),
        (x, W_q, scale, zero, torch.randn(3)),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError)):
            hqq_linear(*arguments, 4, 1)
