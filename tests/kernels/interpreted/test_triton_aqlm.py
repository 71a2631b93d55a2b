"""The Triton kernels of AQLM in Triton's interpreter, against the reference and a float64 truth."""

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from rounding import rounded
from test_aqlm_cpu import random_weight, true_weight
from test_hqq_op import assert_as_exact_as

from quantlayers_kernels import gpu
from quantlayers_kernels.aqlm import aqlm_dequantize, aqlm_linear
from quantlayers_kernels.aqlm import gpu as aqlm_gpu
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (num_codebooks, nbits_per_codebook, out_group_size, in_group_size): published schemes, then odd ones
SCHEMES = [
    (2, 8, 1, 8), (1, 16, 1, 8), (1, 8, 1, 8), (8, 8, 1, 32), (1, 12, 1, 8), (4, 4, 2, 8), (1, 10, 3, 16),
    (1, 1, 1, 1), (3, 5, 4, 6),
]  # fmt: skip
# (output groups, input groups)
GROUPS = [(1, 1), (13, 23)]

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dense_rows_are_those_of_the_reference_to_the_bit_and_nothing_else_is_written(scheme):
    for float_dtype, dtype in zip(DTYPES, [torch.bfloat16, torch.float32, torch.float16], strict=True):
        for n_out, n_in in GROUPS:
            parts = random_weight(scheme, n_out, n_in, float_dtype)
            reference = dequantize_aqlm_reference(*parts)
            rows = slice(len(reference) // 2, len(reference))
            memory = torch.full((2 + reference[rows].numel(),), torch.nan, dtype=dtype)
            into = memory[1:-1].view(-1, reference.shape[1])
            aqlm_gpu.dequantize_rows(*parts, rows=rows, into=into)
            assert torch.equal(into, rounded(reference[rows], dtype))
            assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize(("scheme", "dtype"), zip(SCHEMES, cycle(DTYPES)), ids=str)
def test_the_error_of_a_product_is_at_most_twice_that_of_the_dense_one(scheme, dtype):
    for n_out, n_in in GROUPS:
        parts = random_weight(scheme, n_out, n_in, torch.float16)
        dense = dequantize_aqlm_reference(*parts)
        bias = torch.randn(dense.shape[0])
        for n_tokens in (1, 5):
            x = torch.randn(n_tokens, dense.shape[1]).to(dtype)
            is_left_to_cublas = n_tokens > 1 and dtype == torch.float32
            assert aqlm_gpu.can_use_few_tokens(x, *parts, bias) != is_left_to_cublas
            if is_left_to_cublas:
                continue
            y = aqlm_gpu.linear_few_tokens(x, *parts, bias)
            plain = rounded(F.linear(x.float(), rounded(dense, dtype).float(), bias), dtype)
            assert y.dtype == dtype
            assert_as_exact_as(y, plain, F.linear(x.double(), true_weight(*parts), bias.double()))


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_the_inputs_are_divided_among_programs_where_there_are_few_rows(n_tokens, monkeypatch):
    parts = []
    splits = gpu.splits
    monkeypatch.setattr(gpu, "splits", lambda *arguments: parts.append(splits(*arguments)) or parts[-1])
    monkeypatch.setattr(aqlm_gpu, "TOKEN_FORMS", [aqlm_gpu.Form(rows=8, inputs=32, warps=4)])
    weight = random_weight((2, 8, 1, 8), 3, 131, torch.float16)
    x, bias = torch.randn(n_tokens, 131 * 8), torch.randn(3)
    expected = F.linear(x, dequantize_aqlm_reference(*weight), bias)
    for given_bias in (bias, None):
        y = aqlm_gpu.linear_few_tokens(x, *weight, given_bias)
        torch.testing.assert_close(y, expected if given_bias is not None else expected - bias, rtol=1e-4, atol=1e-4)
    assert min(parts) > 1


@pytest.mark.parametrize("scheme", [(2, 8, 1, 8), (3, 5, 4, 6)], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_a_product_is_right_in_every_form(n_tokens, scheme, in_form):
    weight = random_weight(scheme, 18, 23, torch.float16)
    dense = dequantize_aqlm_reference(*weight)
    x, bias = torch.randn(n_tokens, dense.shape[1]), torch.randn(len(dense))
    x = x if n_tokens == 1 else x.half()
    expected = F.linear(x.float(), dense, bias)
    forms = aqlm_gpu.TOKEN_FORMS if n_tokens == 1 else aqlm_gpu.dot_forms(n_tokens)
    for form in forms:
        with in_form(form):
            y = aqlm_gpu.linear_few_tokens(x, *weight, bias)
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_more_tokens_than_one_tile_holds_are_right():
    weight = random_weight((2, 8, 1, 8), 35, 8, torch.float16)
    x = torch.randn(gpu.MAX_DOT_TOKENS + 3, 64)
    y = aqlm_gpu.linear_few_tokens(x, *weight, None)
    torch.testing.assert_close(y, F.linear(x, dequantize_aqlm_reference(*weight)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scheme", [(2, 4, 1, 8), (1, 12, 1, 8), (2, 3, 1, 3)], ids=str)
def test_no_stored_code_reads_outside_of_its_codebook(scheme):
    """The codebooks lie between NaN, and the codes take every value that their type has."""
    codes, codebooks, scales = random_weight(scheme, 70, 40, torch.float32)
    memory = torch.full((3, codebooks.numel()), torch.nan)
    memory[1] = codebooks.flatten()
    inside = memory[1].view(codebooks.shape)
    reference = dequantize_aqlm_reference(codes, codebooks, scales)
    for n_tokens in (1, 3):
        x = torch.randn(n_tokens, 40 * scheme[3])
        y = aqlm_gpu.linear_few_tokens(x, codes, inside, scales, None)
        torch.testing.assert_close(y, F.linear(x, reference), rtol=1e-4, atol=1e-4)
    assert torch.equal(
        aqlm_gpu.dequantize_rows(codes, inside, scales, rows=slice(0, 70), into=torch.empty_like(reference)), reference
    )


def test_arguments_that_are_not_contiguous_give_the_same_product():
    codes, codebooks, scales = random_weight((2, 8, 1, 8), 18, 6, torch.float16)
    bias = torch.randn(36)[::2]
    strided = codes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for n_tokens in (1, 3):
        x = torch.randn(48, 2 * n_tokens)[:, ::2].t()
        expected = aqlm_gpu.linear_few_tokens(x.contiguous(), codes, codebooks, scales, bias.contiguous())
        assert torch.equal(aqlm_gpu.linear_few_tokens(x, strided, codebooks, scales, bias), expected)


@pytest.mark.parametrize("scheme", [(2, 8, 1, 8), (1, 12, 2, 4)], ids=str)
@pytest.mark.parametrize("n_tokens", [1, 4, 80])
def test_the_operators_gradients_match_those_of_plain_torch(n_tokens, scheme, monkeypatch):
    codes, *floats = random_weight(scheme, 6, 16, torch.float32)
    shape = dequantize_aqlm_reference(codes, *floats).shape
    x, bias, grad = torch.randn(n_tokens, shape[1]), torch.randn(shape[0]), torch.randn(n_tokens, shape[0])

    def run():
        leaves = [part.clone().requires_grad_() for part in (x, *floats, bias)]
        y = aqlm_linear(leaves[0], codes, *leaves[1:])
        assert y._base is None
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    ours = run()
    monkeypatch.setattr(gpu, "is_available", lambda: False)
    for result, expected in zip(ours, run(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


def test_the_operators_keep_the_rules_of_torch_library():
    weight = random_weight((2, 8, 1, 8), 6, 8, torch.float16)
    for n_tokens in (1, 3):
        torch.library.opcheck(aqlm_linear, (torch.randn(n_tokens, 64, requires_grad=True), *weight, torch.randn(6)))
    torch.library.opcheck(aqlm_dequantize, (*weight, torch.bfloat16))


def test_what_the_kernels_do_not_take_is_left_to_plain_torch(monkeypatch):
    codes, codebooks, scales = random_weight((2, 8, 1, 8), 6, 8, torch.float16)
    x = torch.randn(2, 64).half()
    assert aqlm_gpu.can_use_few_tokens(x, codes, codebooks, scales, None)
    assert not aqlm_gpu.can_use_few_tokens(x.float(), codes, codebooks, scales, None)
    assert not aqlm_gpu.can_use_few_tokens(x.double(), codes, codebooks, scales, None)
    assert not aqlm_gpu.can_use_few_tokens(x[:0], codes, codebooks, scales, None)
    assert not aqlm_gpu.can_use_few_tokens(x, codes.int(), codebooks, scales, None)
    assert not aqlm_gpu.can_use_few_tokens(x, codes, codebooks[:, :200], scales, None)
    assert not aqlm_gpu.can_use_few_tokens(x, codes, codebooks, scales[:5], None)
    assert not aqlm_gpu.can_use_few_tokens(x, codes, codebooks, scales, torch.randn(3))
    assert not aqlm_gpu.can_use_few_tokens(torch.randn(gpu.MAX_TOKENS + 1, 64).half(), codes, codebooks, scales, None)
    monkeypatch.setattr(gpu, "is_available", lambda: False)
    assert not aqlm_gpu.can_use_few_tokens(x, codes, codebooks, scales, None)
