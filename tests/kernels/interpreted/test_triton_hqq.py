"""The Triton kernels of HQQ in Triton's interpreter, against the reference and a float64 truth."""

from itertools import cycle

import pytest
import torch
import torch.nn.functional as F
from rounding import rounded
from test_hqq_op import assert_as_exact_as, dense_weight, random_weight

from quantlayers_kernels import gpu
from quantlayers_kernels.bitpack import SUPPORTED_NBITS
from quantlayers_kernels.hqq import gpu as hqq_gpu
from quantlayers_kernels.hqq import hqq_dequantize, hqq_linear, op, triton_kernels
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (out_features, in_features, n_groups): groups of 8, 16, 64, of a row; rows that blocks do not divide
SHAPES = [(3, 8, 1), (5, 64, 4), (33, 1152, 18), (2, 1024, 1)]
# Groups that no vector divides, and rows whose last byte is not full.
RAGGED = [(1, 1, 1), (7, 100, 4), (5, 63, 3)]

pytestmark = pytest.mark.usefixtures("triton_on_cpu")


def reference(weight, nbits: int, in_features: int) -> torch.Tensor:
    return dequantize_hqq_reference(*weight, nbits=nbits, axis=1, in_features=in_features)


@pytest.mark.parametrize("shape", SHAPES + RAGGED, ids=str)
@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_dense_rows_are_those_of_the_reference_to_the_bit_and_nothing_else_is_written(nbits, shape):
    out_features, in_features, _ = shape
    dtypes = list(zip(DTYPES, [torch.bfloat16, torch.float32, torch.float16], strict=True))
    if out_features * in_features > 10_000:  # slow; a width has one of them, and the small shapes have all
        dtypes = [dtypes[nbits % 3]]
    for metadata_dtype, dtype in dtypes:
        weight = random_weight(nbits, 1, shape, metadata_dtype)
        if not hqq_gpu.can_dequantize(*weight, nbits=nbits, axis=1, in_features=in_features):
            assert nbits in (3, 5, 6)
            assert shape in RAGGED
            continue
        expected = reference(weight, nbits, in_features)
        rows = slice(out_features // 2, out_features)
        memory = torch.full((2 + expected[rows].numel(),), torch.nan, dtype=dtype)
        into = memory[1:-1].view(-1, in_features)
        hqq_gpu.dequantize_rows(*weight, nbits=nbits, rows=rows, into=into)
        assert torch.equal(into, rounded(expected[rows], dtype))
        assert memory[[0, -1]].isnan().all()


@pytest.mark.parametrize(("nbits", "dtype"), zip(SUPPORTED_NBITS, cycle(DTYPES)), ids=str)
def test_the_error_of_a_product_is_at_most_twice_that_of_the_dense_one(nbits, dtype):
    for shape in SHAPES + RAGGED:
        out_features, in_features, _ = shape
        weight = random_weight(nbits, 1, shape, torch.float16)
        dense = reference(weight, nbits, in_features)
        bias = torch.randn(out_features)
        for n_tokens in (1, 5) if out_features < 30 else (1, 17):
            x = torch.randn(n_tokens, in_features).to(dtype)
            if not hqq_gpu.can_use_few_tokens(x, *weight, bias, nbits=nbits, axis=1):
                assert shape in RAGGED + SHAPES[:2] or (n_tokens > 1 and dtype == torch.float32)
                continue
            y = hqq_gpu.linear_few_tokens(x, *weight, bias, nbits=nbits)
            plain = rounded(F.linear(x.float(), rounded(dense, dtype).float(), bias), dtype)
            assert y.dtype == dtype
            assert_as_exact_as(y, plain, F.linear(x.double(), dense.double(), bias.double()))


@pytest.mark.parametrize("nbits", [3, 4])
@pytest.mark.parametrize("n_tokens", [1, 3])
def test_the_inputs_are_divided_among_programs_where_there_are_few_rows(nbits, n_tokens, monkeypatch):
    """Where one part does not begin on a whole step, too."""
    parts = []
    splits = gpu.splits
    monkeypatch.setattr(gpu, "splits", lambda *arguments: parts.append(splits(*arguments)) or parts[-1])
    monkeypatch.setattr(hqq_gpu, "TOKEN_FORMS", [hqq_gpu.TokenForm(weights=2048, warps=4)])
    in_features = 64 * 8 * 11
    weight = random_weight(nbits, 1, (3, in_features, 88), torch.float16)
    x, bias = torch.randn(n_tokens, in_features), torch.randn(3)
    expected = F.linear(x, reference(weight, nbits, in_features), bias)
    for given_bias in (bias, None):
        y = hqq_gpu.linear_few_tokens(x, *weight, given_bias, nbits=nbits)
        torch.testing.assert_close(y, expected if given_bias is not None else expected - bias, rtol=1e-4, atol=1e-4)
    assert min(parts) > 1


@pytest.mark.parametrize("nbits", [2, 3, 8])
@pytest.mark.parametrize("n_tokens", [1, 5, 40])
def test_a_product_is_right_in_every_form(n_tokens, nbits, in_form):
    weight = random_weight(nbits, 1, (70, 576, 9), torch.float16)
    x, bias = torch.randn(n_tokens, 576).to(torch.float32 if n_tokens == 1 else torch.float16), torch.randn(70)
    expected = F.linear(x.float(), reference(weight, nbits, 576), bias)
    forms = hqq_gpu.TOKEN_FORMS if n_tokens == 1 else hqq_gpu.dot_forms(n_tokens)
    for form in forms:
        with in_form(form):
            y = hqq_gpu.linear_few_tokens(x, *weight, bias, nbits=nbits)
        torch.testing.assert_close(y.float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_more_tokens_than_one_tile_holds_are_right():
    weight = random_weight(4, 1, (35, 64, 1), torch.float16)
    x = torch.randn(gpu.MAX_DOT_TOKENS + 3, 64)
    y = hqq_gpu.linear_few_tokens(x, *weight, None, nbits=4)
    torch.testing.assert_close(y, F.linear(x, reference(weight, 4, 64)), rtol=1e-4, atol=1e-4)


def test_a_zero_far_from_the_codes_is_as_exact_as_in_the_reference():
    W_q, scale, zero = random_weight(4, 1, (8, 256, 4), torch.float32)
    zero = zero - 1000
    weight = dense_weight(W_q, scale.double(), zero.double(), nbits=4, axis=1, in_features=256)
    for n_tokens in (1, 2):
        x = torch.randn(n_tokens, 256) + 3
        y = hqq_gpu.linear_few_tokens(x, W_q, scale, zero, None, nbits=4)
        plain = F.linear(x, reference((W_q, scale, zero), 4, 256))
        assert_as_exact_as(y, plain, F.linear(x.double(), weight))


def test_arguments_that_are_not_contiguous_give_the_same_product():
    W_q, scale, zero = random_weight(4, 1, (6, 128, 4))
    bias = torch.randn(12)[::2]
    strided = [part.t().contiguous().t() for part in (W_q, scale, zero)]
    for n_tokens in (1, 4):
        x = torch.randn(128, 2 * n_tokens)[:, ::2].t()
        y = hqq_gpu.linear_few_tokens(x, *strided, bias, nbits=4)
        assert torch.equal(y, hqq_gpu.linear_few_tokens(x.contiguous(), W_q, scale, zero, bias.contiguous(), nbits=4))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Names of the kernels that the test launches."""
    names: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(triton_kernels, name)

        def __getitem__(self, grid):
            names.append(self.name)
            return self.kernel[grid]

    for name in ("dequantize", "one_token", "few_tokens"):
        monkeypatch.setattr(triton_kernels, name, Recorded(name))
    return names


def test_the_kernels_are_used_where_their_predicates_say_so_and_nowhere_else(launched):
    weight = random_weight(4, 1, (6, 64, 4), torch.float16)

    def kernels(x, *weight, axis=1):
        launched.clear()
        y = hqq_linear(x, *weight, None, 4, axis)
        assert y._base is None
        return launched

    few = torch.randn(2, 3, 64)
    assert kernels(few[:1, :1], *weight) == ["one_token"]
    assert kernels(few[0, 0], *weight) == ["one_token"]
    assert kernels(few.half(), *weight) == ["few_tokens"]
    assert kernels(few, *weight) == ["dequantize"]  # float32 has no tensor cores
    assert kernels(torch.randn(gpu.MAX_TOKENS + 1, 64), *weight) == ["dequantize"]
    assert kernels(torch.randn(0, 64), *weight) == ["dequantize"]
    assert kernels(few.double(), *weight) == ["dequantize"]
    assert kernels(few, weight[0], *(part.double() for part in weight[1:])) == []
    assert kernels(few, *random_weight(4, 0, (6, 64, 3)), axis=0) == []
    assert kernels(few, *random_weight(4, 1, (6, 64, 8))) == ["dequantize"]  # groups of 8


def test_many_tokens_are_multiplied_with_tiles_that_were_written_in_their_dtype(
    launched, monkeypatch, set_tile_elements
):
    set_tile_elements(4 * 64)
    monkeypatch.setattr(op, "product_dtype", lambda dtype, device: dtype)
    written = []
    run = hqq_gpu.dequantize_rows
    monkeypatch.setattr(
        hqq_gpu, "dequantize_rows", lambda *a, into, **k: written.append(into) or run(*a, into=into, **k)
    )
    weight = random_weight(4, 1, (6, 64, 4), torch.float16)
    x = torch.randn(gpu.MAX_TOKENS + 1, 64).half()
    y = hqq_linear(x, *weight, None, 4, 1)
    assert [(into.dtype, into.shape[0]) for into in written] == [(torch.float16, 4), (torch.float16, 2)]
    assert written[0].data_ptr() == written[1].data_ptr()
    torch.testing.assert_close(y, F.linear(x, reference(weight, 4, 64).half()))
    for dtype in DTYPES:
        assert hqq_dequantize(*weight, 4, 1, 64, dtype).dtype == dtype
        assert written[-1].dtype == dtype
    assert torch.equal(hqq_dequantize(*weight, 4, 1, 64, torch.float64), reference(weight, 4, 64).double())


@pytest.mark.parametrize("n_tokens", [1, 4, 80])
def test_the_operators_gradients_match_those_of_plain_torch(n_tokens, monkeypatch):
    W_q, *metadata = random_weight(3, 1, (6, 128, 4))
    x, bias, grad = torch.randn(n_tokens, 128), torch.randn(6), torch.randn(n_tokens, 6)

    def run():
        leaves = [part.clone().requires_grad_() for part in (x, *metadata, bias)]
        y = hqq_linear(leaves[0], W_q, *leaves[1:], 3, 1)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    ours = run()
    monkeypatch.setattr(gpu, "is_available", lambda: False)
    for result, expected in zip(ours, run(), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_the_operators_keep_the_rules_of_torch_library(n_tokens):
    W_q, scale, zero = random_weight(4, 1, (6, 64, 4))
    x = torch.randn(n_tokens, 64, requires_grad=True)
    torch.library.opcheck(hqq_linear, (x, W_q, scale, zero, torch.randn(6), 4, 1))
    torch.library.opcheck(hqq_dequantize, (W_q, scale, zero, 4, 1, 64, torch.float16))


def test_a_compiled_function_is_one_graph():
    weight = random_weight(4, 1, (6, 64, 4))
    x = torch.randn(2, 64)
    compiled = torch.compile(lambda x: hqq_linear(x, *weight, None, 4, 1), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), hqq_linear(x, *weight, None, 4, 1))


def test_shapes_that_contradict_each_other_raise_and_never_reach_the_kernels(launched):
    W_q, scale, zero = random_weight(4, 1, (6, 64, 4))
    x = torch.randn(2, 64)
    wrong = [
        (x[:, :60], W_q, scale, zero, None),
        (x, W_q[:, :30], scale, zero, None),
        (x, W_q, scale[:5], zero, None),
        (x, W_q, scale, zero[:, :3], None),
        (x, W_q, scale, zero, torch.randn(3)),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, RuntimeError)):
            hqq_linear(*arguments, 4, 1)
    assert set(launched) <= {"dequantize"}
