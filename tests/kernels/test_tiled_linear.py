"""The default product: the numbers and gradients of the dense weight, one tile of which exists at a time."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile

from quantlayers_kernels import precision
from quantlayers_kernels.tiled_linear import tiled_linear

GROUP = 8


def random_weight(out_features: int, in_features: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Codes with a scale for each group of a row, and a table of levels that all rows share."""
    return {
        "codes": torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8),
        "scale": (torch.rand(out_features, in_features // GROUP) + 0.5).to(dtype),
        "levels": torch.randn(16).to(dtype),
    }


def dequantize_rows(tensors: dict[str, Tensor], rows: slice, dtype: torch.dtype) -> Tensor:
    levels, scale = tensors["levels"].to(dtype), tensors["scale"][rows].to(dtype)
    return levels[tensors["codes"][rows].long()] * scale.repeat_interleave(GROUP, dim=1)


def trained(tensors: dict[str, Tensor], *names: str) -> list[Tensor]:
    return [tensors[name].requires_grad_() for name in names]


def dense(x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The composed form, in ``dtype``."""
    weight = dequantize_rows(tensors, slice(0, len(tensors["codes"])), dtype)
    return linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


SHAPES = [(1, 8), (7, 24), (63, 40), (100, 64)]


@pytest.mark.parametrize("n_tiles", [1, 5])
@pytest.mark.parametrize("tokens", [(3, 5), (2,), (), (0, 4)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_those_of_the_dense_weight(shape, tokens, n_tiles, set_tile_elements):
    set_tile_elements(max(1, shape[0] // n_tiles) * shape[1])
    tensors = random_weight(*shape, torch.float64)
    x = torch.randn(*tokens, shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    wanted = [x, bias, *trained(tensors, "scale", "levels")]
    expected = dense(x, tensors, bias, torch.float64)
    y = tiled_linear(x, tensors, dequantize_rows, bias, out_features=shape[0])
    torch.testing.assert_close(y, expected)
    grad = torch.randn(y.shape, dtype=y.dtype)
    for found, truth in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(found, truth)


def test_gradients_pass_gradcheck_and_second_ones_are_refused(set_tile_elements):
    set_tile_elements(2 * 16)
    tensors = random_weight(5, 16, torch.float64)
    x, bias = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 16), (5,)))

    def run(x, bias, scale, levels):
        return tiled_linear(x, tensors | {"scale": scale, "levels": levels}, dequantize_rows, bias, out_features=5)

    arguments = (x, bias, *trained(tensors, "scale", "levels"))
    torch.autograd.gradcheck(run, arguments)
    (gradient,) = torch.autograd.grad(run(*arguments).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_is_frozen_gets_no_gradient_and_a_tensor_that_is_not_read_gets_zeros():
    tensors = random_weight(6, 16) | {"unused": torch.randn(3)}
    x = torch.randn(2, 16)
    y = tiled_linear(x, tensors, dequantize_rows, None, out_features=6)
    assert not y.requires_grad
    _, unused = trained(tensors, "scale", "unused")
    tiled_linear(x, tensors, dequantize_rows, None, out_features=6).sum().backward()
    assert tensors["levels"].grad is None
    assert tensors["scale"].grad.abs().sum() > 0
    assert torch.equal(unused.grad, torch.zeros(3))


@pytest.mark.parametrize("has_units", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_at_most_twice_those_of_the_dense_product(dtype, has_units, set_tile_elements, monkeypatch):
    monkeypatch.setattr(precision, "_is_faster_on_cpu", lambda dtype: has_units)
    set_tile_elements(16 * 128)
    tensors = random_weight(200, 128, dtype)
    x = torch.randn(24, 128).to(dtype).requires_grad_()
    bias = torch.randn(200).to(dtype).requires_grad_()
    wanted = [x, bias, *trained(tensors, "scale", "levels")]
    grad = torch.randn(24, 200).to(dtype)

    def values(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))]

    ours = values(tiled_linear(x, tensors, dequantize_rows, bias, out_features=200))
    plain = values(dense(x, tensors, bias, dtype))
    x64, bias64 = x.double(), bias.double()
    exact = linear(x64, dequantize_rows(tensors, slice(0, 200), torch.float64), bias64)
    truths = [exact, *torch.autograd.grad(exact, wanted, grad.double())]
    for found, reference, truth in zip(ours, plain, truths, strict=True):
        assert found.dtype == dtype
        assert (found.double() - truth).norm() <= 2 * (reference.double() - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    tensors = random_weight(20, 16)
    x = torch.randn(5, 16).to(dtype).requires_grad_()
    wanted = [x, *trained(tensors, "scale", "levels")]

    def run() -> list[Tensor]:
        y = tiled_linear(x, tensors, dequantize_rows, None, out_features=20)
        return [y, *torch.autograd.grad(y, wanted, torch.ones_like(y))]

    expected = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run()
    for each, truth in zip(found, expected, strict=True):
        assert torch.equal(each, truth)


def test_ranges_of_rows_respect_the_multiple_also_in_the_backward_pass(set_tile_elements):
    set_tile_elements(7 * 16)
    tensors, seen = random_weight(20, 16), []
    trained(tensors, "scale")

    def record(tensors, rows, dtype):
        seen.append((rows.start, rows.stop))
        return dequantize_rows(tensors, rows, dtype)

    x = torch.randn(3, 16, requires_grad=True)
    tiled_linear(x, tensors, record, None, out_features=20, multiple=4).sum().backward()
    assert seen == 3 * [(start, start + 4) for start in range(0, 20, 4)]


def test_the_result_is_no_view_and_may_be_added_to_in_place():
    tensors = random_weight(20, 16)
    x = torch.randn(3, 5, 16, requires_grad=True)
    y = tiled_linear(x, tensors, dequantize_rows, None, out_features=20)
    assert y._base is None
    y += 1
    y.sum().backward()
    assert x.grad is not None


def test_nothing_dense_is_saved_and_the_input_only_for_trained_metadata():
    tensors = random_weight(20, 64)
    x = torch.randn(3, 64, requires_grad=True)

    def saved() -> set[int]:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
            tiled_linear(x, tensors, dequantize_rows, torch.zeros(20, requires_grad=True), out_features=20)
        return {tensor.data_ptr() for tensor in kept}

    of_weight = {tensor.data_ptr() for tensor in tensors.values()}
    assert saved() == of_weight
    trained(tensors, "scale")
    assert saved() == of_weight | {x.data_ptr()}


def test_no_allocation_is_as_large_as_the_dense_weight(set_tile_elements):
    out_features, in_features = 512, 1024
    set_tile_elements(32 * in_features)
    tensors = random_weight(out_features, in_features)
    x = torch.randn(24, in_features, requires_grad=True)
    wanted = [x, *trained(tensors, "scale", "levels")]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        y = tiled_linear(x, tensors, dequantize_rows, None, out_features=out_features)
        torch.autograd.grad(y.sum(), wanted)
    assert 0 < max(event.self_cpu_memory_usage for event in profiled.events()) < out_features * in_features


def test_a_weight_that_was_written_to_since_the_forward_pass_is_refused():
    tensors = random_weight(20, 16)
    y = tiled_linear(torch.randn(3, 16, requires_grad=True), tensors, dequantize_rows, None, out_features=20)
    tensors["levels"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_a_compiled_function_is_one_graph_and_gives_the_same_values_and_gradients(dtype, tolerance):
    tensors = random_weight(20, 16)
    x, bias = torch.randn(3, 16).to(dtype).requires_grad_(), torch.randn(20).to(dtype).requires_grad_()
    wanted = [x, bias, *trained(tensors, "scale", "levels")]

    def run(x, bias, tensors):
        return tiled_linear(x, tensors, dequantize_rows, bias, out_features=20)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, bias, tensors), run(x, bias, tensors)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    grad = torch.randn(y.shape).to(dtype)
    for found, truth in zip(
        torch.autograd.grad(y, wanted, grad), torch.autograd.grad(expected, wanted, grad), strict=True
    ):
        torch.testing.assert_close(found, truth, rtol=tolerance, atol=tolerance * truth.abs().amax().item())
