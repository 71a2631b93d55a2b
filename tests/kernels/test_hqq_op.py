"""The HQQ operators against their reference and a float64 truth, forward and gradients."""

import pytest
import torch
import torch.nn.functional as F
from conftest import FASTEST_AND_PLAIN

from quantlayers_kernels import tiled
from quantlayers_kernels.bitpack import SUPPORTED_NBITS, pack, unpack
from quantlayers_kernels.hqq import hqq_dequantize, hqq_linear, op
from quantlayers_kernels.hqq.reference import dequantize_hqq_reference, hqq_linear_reference

pytestmark = [
    pytest.mark.usefixtures("kernels"),
    pytest.mark.parametrize("kernels", FASTEST_AND_PLAIN, indirect=True),
]

HALF_AND_FULL = [torch.float32, torch.bfloat16, torch.float16]
# (out_features, in_features, n_groups along the axis) for axis 1 and 0: ragged on purpose
SHAPES = {1: [(1, 1, 1), (5, 63, 3), (7, 100, 4), (2, 64, 64)], 0: [(1, 1, 1), (6, 63, 3), (9, 100, 1), (8, 7, 8)]}
CASES = [(nbits, axis, shape) for nbits in SUPPORTED_NBITS for axis in (0, 1) for shape in SHAPES[axis]]


def random_weight(nbits: int, axis: int, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32):
    """Packed codes, scale and zero of a random HQQ weight."""
    out_features, in_features, n_groups = shape
    codes = torch.randint(0, 2**nbits, (out_features, in_features), dtype=torch.uint8)
    metadata_shape = (out_features, n_groups) if axis == 1 else (n_groups, in_features)
    scale = (0.01 + 0.1 * torch.rand(metadata_shape)).to(dtype)
    zero = ((2**nbits - 1) * torch.rand(metadata_shape)).to(dtype)
    return pack(codes, nbits), scale, zero


def dense_weight(W_q, scale, zero, *, nbits: int, axis: int, in_features: int) -> torch.Tensor:
    """The definition once more, in plain indexing and in the dtype of ``scale``; differentiable."""
    codes = unpack(W_q, nbits, in_features).to(scale.dtype)
    out_features = codes.shape[0]
    if axis == 1:
        group = torch.arange(in_features) // (in_features // scale.shape[1])
        return (codes - zero[:, group]) * scale[:, group]
    group = torch.arange(out_features) % scale.shape[0]
    return (codes - zero[group]) * scale[group]


def assert_as_exact_as(result: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor) -> None:
    """The error of ``result`` is at most twice that of ``plain``, or one float32 rounding where that is exact."""
    assert result.shape == truth.shape
    assert torch.isfinite(result).all()
    allowed = 2 * (plain.double() - truth).norm() + 1.2e-7 * truth.norm()
    assert (result.double() - truth).norm() <= allowed


@pytest.mark.parametrize(("nbits", "axis", "shape"), CASES)
def test_dequantize_is_the_reference_to_the_bit(nbits, axis, shape):
    W_q, scale, zero = random_weight(nbits, axis, shape, torch.float16)
    reference = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=axis, in_features=shape[1])
    assert torch.equal(hqq_dequantize(W_q, scale, zero, nbits, axis, shape[1], torch.float32), reference)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(hqq_dequantize(W_q, scale, zero, nbits, axis, shape[1], dtype), reference.to(dtype))


@pytest.mark.parametrize(("nbits", "axis", "shape"), CASES)
def test_the_reference_is_code_minus_zero_times_scale(nbits, axis, shape):
    W_q, scale, zero = random_weight(nbits, axis, shape)
    reference = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=axis, in_features=shape[1])
    assert torch.equal(reference, dense_weight(W_q, scale, zero, nbits=nbits, axis=axis, in_features=shape[1]))


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", SUPPORTED_NBITS)
def test_dequantize_gradients_match_autograd_through_the_dense_weight(nbits, axis, dtype):
    shape = SHAPES[axis][1]
    W_q, scale, zero = random_weight(nbits, axis, shape, dtype)
    grad = torch.randn(shape[:2])

    def gradients(weight_of, dtype):
        leaves = [part.detach().clone().to(dtype).requires_grad_() for part in (scale, zero)]
        weight = weight_of(W_q, *leaves)
        return torch.autograd.grad(weight, leaves, grad.to(weight.dtype))

    def dense(W_q, scale, zero):
        return dense_weight(W_q, scale, zero, nbits=nbits, axis=axis, in_features=shape[1])

    def plain(W_q, scale, zero):
        return dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=axis, in_features=shape[1])

    def by_operator(W_q, scale, zero):
        return hqq_dequantize(W_q, scale, zero, nbits, axis, shape[1], torch.float32)

    truths = gradients(dense, torch.float64)
    for result, expected, truth in zip(gradients(by_operator, dtype), gradients(plain, dtype), truths, strict=True):
        assert result.dtype == dtype
        assert_as_exact_as(result, expected, truth)


@pytest.mark.parametrize("n_tile_rows", [None, 2], ids=["one tile", "tiles"])
@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize(("nbits", "axis", "shape"), [case for case in CASES if case[2][0] > 2])
def test_linear_and_its_gradients_match_the_float64_truth(nbits, axis, shape, dtype, n_tile_rows, set_tile_elements):
    out_features, in_features, _ = shape
    if n_tile_rows:
        set_tile_elements(n_tile_rows * in_features)
        assert tiled.rows_per_tile(out_features, in_features, torch.device("cpu")) == n_tile_rows
    W_q, scale, zero = random_weight(nbits, axis, shape, dtype)
    x, bias = torch.randn(4, in_features).to(dtype), torch.randn(out_features).to(dtype)
    grad = torch.randn(4, out_features).to(dtype)

    def run(linear, dtype):
        leaves = [part.detach().clone().to(dtype).requires_grad_() for part in (x, scale, zero, bias)]
        y = linear(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(dtype))]

    def dense(x, scale, zero, bias):
        weight = dense_weight(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
        return F.linear(x, weight, bias)

    def plain(x, scale, zero, bias):
        weight = dequantize_hqq_reference(W_q, scale, zero, nbits=nbits, axis=axis, in_features=in_features)
        return F.linear(x, weight.to(x.dtype), bias)

    def by_operator(x, scale, zero, bias):
        return hqq_linear(x, W_q, scale, zero, bias, nbits, axis)

    results, plains, truths = run(by_operator, dtype), run(plain, dtype), run(dense, torch.float64)
    for result, expected, truth in zip(results, plains, truths, strict=True):
        assert result.dtype == dtype
        assert_as_exact_as(result, expected, truth)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3,), (2, 3), (2, 0)], ids=str)
@pytest.mark.parametrize("in_features", [1, 63, 100])
@pytest.mark.parametrize("axis", [0, 1])
def test_linear_matches_the_reference_for_any_number_of_tokens(axis, in_features, lead, dtype):
    shape = (6, in_features, 1 if axis == 1 else 3)
    W_q, scale, zero = random_weight(3, axis, shape, torch.float16)
    x, bias = torch.randn(*lead, in_features).to(dtype).requires_grad_(), torch.randn(6)
    y = hqq_linear(x, W_q, scale, zero, bias, 3, axis)
    assert y.shape == (*lead, 6)
    assert y.dtype == dtype
    weight = dense_weight(W_q, scale.double(), zero.double(), nbits=3, axis=axis, in_features=in_features)
    truth = F.linear(x.double(), weight, bias.double())
    assert_as_exact_as(y, F.linear(x, weight.to(dtype), bias.to(dtype)), truth)
    y.sum().backward()
    ones = torch.ones_like(y)
    assert_as_exact_as(x.grad, ones @ weight.to(dtype), ones.double() @ weight)


@pytest.mark.parametrize("dtype", HALF_AND_FULL)
def test_linear_is_as_exact_as_the_float32_reference_on_a_cpu_without_half_precision_units(dtype, monkeypatch):
    monkeypatch.setattr(op, "product_dtype", lambda dtype, device: torch.float32)
    for axis in (0, 1):
        W_q, scale, zero = random_weight(4, axis, SHAPES[axis][2], torch.float16)
        out_features, in_features, _ = SHAPES[axis][2]
        x, bias = torch.randn(5, in_features).to(dtype), torch.randn(out_features)
        weight = dense_weight(W_q, scale.double(), zero.double(), nbits=4, axis=axis, in_features=in_features)
        reference = hqq_linear_reference(x, W_q, scale, zero, bias, nbits=4, axis=axis)
        y = hqq_linear(x, W_q, scale, zero, bias, 4, axis)
        assert y.dtype == dtype
        assert_as_exact_as(y, reference, F.linear(x.double(), weight, bias.double()))


def test_linear_takes_inputs_that_are_not_contiguous():
    W_q, scale, zero = random_weight(4, 1, (5, 63, 3))
    x = torch.randn(63, 8)[:, ::2].t()
    expanded = torch.randn(1, 63).expand(4, 63)
    for given_x in (x, expanded):
        assert not given_x.is_contiguous()
        expected = hqq_linear(given_x.contiguous(), W_q, scale, zero, None, 4, 1)
        assert torch.equal(hqq_linear(given_x, W_q, scale, zero, None, 4, 1), expected)


def test_metadata_that_is_not_contiguous_gives_the_same_weight_and_gradients():
    W_q, scale, zero = random_weight(4, 1, (5, 63, 3))
    leaves = [part.t().contiguous().t().requires_grad_() for part in (scale, zero)]
    plain = [part.clone().requires_grad_() for part in (scale, zero)]
    assert not leaves[0].is_contiguous()
    x, grad = torch.randn(2, 63), torch.randn(2, 5)
    y, expected = (hqq_linear(x, W_q, *parts, None, 4, 1) for parts in (leaves, plain))
    assert torch.equal(y, expected)
    gradients = torch.autograd.grad(y, leaves, grad)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, plain, grad), strict=True):
        assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("axis", [0, 1])
def test_every_element_is_written_even_over_memory_full_of_nan(axis, monkeypatch, set_tile_elements):
    def nan_filled(*shape, **kwargs):
        return torch.full(shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape, torch.nan, **kwargs)

    W_q, scale, zero = random_weight(5, axis, (9, 100, 1))
    x = torch.randn(3, 100)
    expected = hqq_linear(x, W_q, scale, zero, None, 5, axis)
    monkeypatch.setattr(torch, "empty", nan_filled)
    monkeypatch.setattr(tiled, "_SPARE", tiled._Spare())  # no tiles of earlier products
    set_tile_elements(400)
    assert torch.isfinite(hqq_dequantize(W_q, scale, zero, 5, axis, 100, torch.float32)).all()
    torch.testing.assert_close(hqq_linear(x, W_q, scale, zero, None, 5, axis), expected)


def saved_for_backward(run) -> list[torch.Tensor]:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        run()
    return saved


def test_only_the_packed_weight_is_saved_for_backward_where_the_metadata_is_frozen():
    W_q, scale, zero = random_weight(4, 1, (8, 64, 4))
    x, bias = torch.randn(2, 64, requires_grad=True), torch.randn(8, requires_grad=True)
    saved = saved_for_backward(lambda: hqq_linear(x, W_q, scale, zero, bias, 4, 1))
    assert {tensor.data_ptr() for tensor in saved} == {W_q.data_ptr(), scale.data_ptr(), zero.data_ptr()}


@pytest.mark.parametrize("trained", ["scale", "zero"])
def test_the_input_is_saved_where_scale_or_zero_wants_a_gradient(trained):
    W_q, scale, zero = random_weight(4, 1, (8, 64, 4))
    x = torch.randn(2, 64)
    {"scale": scale, "zero": zero}[trained].requires_grad_()
    saved = saved_for_backward(lambda: hqq_linear(x, W_q, scale, zero, None, 4, 1))
    assert {tensor.data_ptr() for tensor in saved} == {part.data_ptr() for part in (W_q, scale, zero, x)}
    assert all(tensor.numel() < 8 * 64 for tensor in saved)


def test_dequantize_saves_nothing_dense():
    W_q, scale, zero = random_weight(4, 1, (8, 64, 4))
    saved = saved_for_backward(lambda: hqq_dequantize(W_q, scale.requires_grad_(), zero, 4, 1, 64, torch.float32))
    assert saved
    assert all(tensor.numel() < 8 * 64 for tensor in saved)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_keeps_the_rules_of_torch_library(axis, bias):
    W_q, scale, zero = random_weight(3, axis, (6, 24, 3))
    args = (
        torch.randn(2, 3, 24, requires_grad=True),
        W_q,
        scale.requires_grad_(),
        zero.requires_grad_(),
        torch.randn(6, requires_grad=True) if bias else None,
        3,
        axis,
    )
    torch.library.opcheck(hqq_linear, args)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_other_operators_keep_the_rules_of_torch_library(axis):
    W_q, scale, zero = random_weight(3, axis, (6, 24, 3), torch.float16)
    trained = (W_q, scale.clone().requires_grad_(), zero.clone().requires_grad_())
    torch.library.opcheck(hqq_dequantize, (*trained, 3, axis, 24, torch.bfloat16))
    torch.library.opcheck(op.hqq_input_gradient, (torch.randn(2, 6), W_q, scale, zero, 3, axis, 24))
    torch.library.opcheck(op.hqq_metadata_gradient, (torch.randn(6, 24), W_q, scale, zero, 3, axis))
    transposed = [part.t().contiguous().t() for part in (scale, zero)]
    torch.library.opcheck(op.hqq_metadata_gradient, (torch.randn(6, 24), W_q, *transposed, 3, axis))
    of_product = (torch.randn(2, 6), torch.randn(2, 24))
    torch.library.opcheck(op.hqq_linear_metadata_gradient, (*of_product, W_q, scale, zero, 3, axis))
    torch.library.opcheck(op.hqq_linear_metadata_gradient, (*of_product, W_q, *transposed, 3, axis))


def test_a_compiled_function_is_one_graph_and_gives_the_same_values_and_gradients():
    W_q, scale, zero = random_weight(4, 1, (6, 24, 3))
    scale.requires_grad_()
    x = torch.randn(3, 24, requires_grad=True)

    def loss(x, scale):
        weight = hqq_dequantize(W_q, scale, zero, 4, 1, 24, torch.float32)
        return hqq_linear(x, W_q, scale, zero, None, 4, 1).square().sum() + weight.square().sum()

    plain = torch.autograd.grad(loss(x, scale), [x, scale])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, scale), loss(x, scale))
    for gradient, expected in zip(torch.autograd.grad(compiled(x, scale), [x, scale]), plain, strict=True):
        torch.testing.assert_close(gradient, expected)
