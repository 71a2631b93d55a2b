"""The compiled AQLM kernels against the reference and a float64 truth, on every instruction set."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import COMPILED
from test_hqq_op import assert_as_exact_as

from quantlayers_kernels import native
from quantlayers_kernels.aqlm import aqlm_linear, cpu
from quantlayers_kernels.aqlm.reference import dequantize_aqlm_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (num_codebooks, nbits_per_codebook, out_group_size, in_group_size): published schemes, then odd ones
SCHEMES = [
    (2, 8, 1, 8), (1, 16, 1, 8), (8, 8, 1, 32), (1, 12, 1, 8), (4, 4, 2, 8), (1, 10, 3, 16), (1, 1, 1, 1), (3, 5, 4, 6)
]  # fmt: skip
# (output groups, input groups)
GROUPS = [(1, 1), (63, 5), (21, 72)]
TOKENS = (1, 2, 3, 4, 5, 7, 16, 17)

pytestmark = pytest.mark.parametrize("kernels", COMPILED, indirect=True)


def random_weight(scheme, n_out: int, n_in: int, dtype: torch.dtype):
    """codes, codebooks and scales; the codes use every stored value, also those past the codebook's size."""
    num_codebooks, nbits, out_group, in_group = scheme
    code_type = torch.int8 if nbits <= 8 else torch.int16
    limits = torch.iinfo(code_type)
    codes = torch.randint(limits.min, limits.max + 1, (n_out, n_in, num_codebooks)).to(code_type)
    codebooks = torch.randn(num_codebooks, 2**nbits, out_group, in_group).to(dtype)
    return codes, codebooks, (0.5 + torch.rand(n_out, 1, 1, 1)).to(dtype)


def true_weight(codes, codebooks, scales) -> torch.Tensor:
    """The definition in float64."""
    index = codes.long() % codebooks.shape[1]
    total = sum(codebooks[m].double()[index[:, :, m]] for m in range(codebooks.shape[0]))
    return (total * scales.double()).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_error_of_few_tokens_is_at_most_twice_that_of_the_dense_product(scheme, dtype, kernels):
    for n_out, n_in in GROUPS:
        parts = random_weight(scheme, n_out, n_in, dtype)
        weight = true_weight(*parts)
        bias = torch.randn(weight.shape[0])
        inputs = [torch.randn(n_tokens, weight.shape[1]) for n_tokens in TOKENS]
        y = torch.cat([cpu.linear_few_tokens(x, *parts, bias) for x in inputs])
        x = torch.cat(inputs)
        plain = F.linear(x, dequantize_aqlm_reference(*parts), bias)
        assert_as_exact_as(y, plain, F.linear(x.double(), weight, bias.double()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dense_rows_are_those_of_the_reference_to_the_bit_and_nothing_else_is_written(scheme, dtype, kernels):
    for n_out, n_in in GROUPS:
        parts = random_weight(scheme, n_out, n_in, dtype)
        reference = dequantize_aqlm_reference(*parts)
        ranges = (slice(0, len(reference)), slice(len(reference) // 2, len(reference)))
        for rows, written in product(ranges, native.WRITTEN):
            memory = torch.full((2 + reference[rows].numel(),), torch.nan, dtype=written)
            into = memory[1:-1].view(-1, reference.shape[1])
            cpu.dequantize_rows(*parts, rows=rows, into=into)
            assert torch.equal(into, reference[rows].to(written))
            assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize("scheme", [(2, 4, 1, 8), (1, 12, 1, 8), (2, 3, 1, 3)], ids=str)
def test_no_stored_code_reads_outside_of_its_codebook(scheme, kernels):
    """The codebooks lie between NaN, and the codes take every value that their type has."""
    codes, codebooks, scales = random_weight(scheme, 300, 40, torch.float32)
    memory = torch.full((3, codebooks.numel()), torch.nan)
    memory[1] = codebooks.flatten()
    inside = memory[1].view(codebooks.shape)
    for n_tokens in (1, 3):
        x = torch.randn(n_tokens, 40 * scheme[3])
        y = cpu.linear_few_tokens(x, codes, inside, scales, None)
        assert torch.equal(y, cpu.linear_few_tokens(x, codes, codebooks, scales, None))
        assert y.isfinite().all()


def test_arguments_that_are_not_contiguous_give_the_same_product(kernels):
    codes, codebooks, scales = random_weight((2, 8, 1, 8), 9, 6, torch.float16)
    x, bias = torch.randn(48, 6)[:, ::2].t(), torch.randn(18)[::2]
    expected = cpu.linear_few_tokens(x.contiguous(), codes, codebooks, scales, bias.contiguous())
    strided = codes.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(part.is_contiguous() for part in (x, bias, strided))
    assert torch.equal(cpu.linear_few_tokens(x, strided, codebooks, scales, bias), expected)


def test_the_fast_path_is_taken_where_its_predicate_says_so_and_nowhere_else(kernels, monkeypatch):
    parts = random_weight((2, 8, 1, 8), 9, 6, torch.float16)
    codes, codebooks, scales = parts
    calls = []
    run = native.call
    monkeypatch.setattr(native, "call", lambda name, *arguments: (calls.append(name), run(name, *arguments)))

    def names(x, codes, codebooks, scales, bias=None):
        calls.clear()
        aqlm_linear(x, codes, codebooks, scales, bias)
        return set(calls)

    few, many = torch.randn(2, cpu.MAX_TOKENS // 2, 48), torch.randn(cpu.MAX_TOKENS + 1, 48)
    assert names(few, *parts, torch.randn(9)) == {"ql_aqlm_linear"}
    assert names(many, *parts) == {"ql_aqlm_dequantize"}
    assert names(torch.randn(0, 48), *parts) == {"ql_aqlm_dequantize"}
    assert names(few.double(), *parts) == {"ql_aqlm_dequantize"}
    assert names(few, codes.int(), codebooks, scales) == set()
    assert names(few, codes, codebooks.double(), scales) == set()


def test_shapes_that_contradict_each_other_raise_and_never_reach_the_kernels(kernels):
    codes, codebooks, scales = random_weight((2, 8, 1, 8), 9, 6, torch.float16)
    x = torch.randn(2, 48)
    wrong = [
        (x[:, :40], codes, codebooks, scales, None),
        (x, codes[:, :5], codebooks, scales, None),
        (x, codes, codebooks, scales[:5], None),
        (x, codes, codebooks, scales, torch.randn(3)),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError)):
            aqlm_linear(*arguments)
