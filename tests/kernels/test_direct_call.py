"""The operator is skipped where nothing but numbers is wanted, with the same bits, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from quantlayers_kernels import aqlm, hqq
from quantlayers_kernels.bitpack import pack
from quantlayers_kernels.direct_call import can_skip_operator

IN, OUT = 32, 6


def call(method: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """The chosen way, the operator, and the arguments after ``x`` up to the bias."""
    if method == "hqq":
        W_q = pack(torch.randint(0, 16, (OUT, IN)).byte(), 4)
        weight = [W_q, torch.rand(OUT, 4), torch.rand(OUT, 4), torch.randn(OUT)]
        return (lambda *a: hqq.linear(*a, 4, 1)), (lambda *a: hqq.hqq_linear(*a, 4, 1)), weight
    codes = torch.randint(-128, 128, (OUT, IN // 8, 2), dtype=torch.int8)
    return (
        aqlm.linear,
        aqlm.aqlm_linear,
        [codes, torch.randn(2, 256, 1, 8), torch.rand(OUT, 1, 1, 1), torch.randn(OUT)],
    )


# By hand: the kernels' operators.
METHODS = pytest.mark.parametrize("method", ["hqq", "aqlm"])


class Subclass(Tensor):
    pass


class MarkedParameter(nn.Parameter):
    """Like the codes of a layer: a Parameter with methods of its own."""


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@METHODS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tokens", [(), (1,), (2, 3), (40,), (0, 4)], ids=str)
def test_values_are_the_operators_to_the_bit(method, tokens, dtype):
    linear, operator, weight = call(method)
    x = torch.randn(*tokens, IN).to(dtype)
    y = linear(x, *weight)
    assert y.dtype == dtype
    assert y._base is None
    assert torch.equal(y, operator(x, *weight))


@METHODS
def test_gradients_are_the_operators(method):
    linear, operator, weight = call(method)
    wanted = [torch.randn(3, IN), *weight[1:]]
    for tensor in wanted:
        tensor.requires_grad_()
    x, weight = wanted[0], [weight[0], *wanted[1:]]
    found, expected = (torch.autograd.grad(way(x, *weight).sum(), wanted) for way in (linear, operator))
    for gradient, truth in zip(found, expected, strict=True):
        assert torch.equal(gradient, truth)


@METHODS
def test_a_dispatch_mode_sees_the_operator(method):
    linear, _, weight = call(method)
    x = torch.randn(1, IN)
    with Recorder() as recorder:
        linear(x, *weight)
    assert recorder.names == [f"quantlayers.{method}_linear.default"]


@METHODS
def test_a_compiled_call_is_the_operator_in_one_graph(method):
    linear, _, weight = call(method)
    graphs = []

    def backend(graph, inputs):
        graphs.append(str(graph.graph))
        return graph

    compiled = torch.compile(lambda x: linear(x, *weight), fullgraph=True, backend=backend)
    x = torch.randn(1, IN)
    assert torch.equal(compiled(x), linear(x, *weight))
    assert len(graphs) == 1
    assert f"quantlayers.{method}_linear" in graphs[0]


@METHODS
def test_fake_tensors_get_a_shape(method):
    linear, _, weight = call(method)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert linear(mode.from_tensor(torch.randn(2, IN)), *weight).shape == (2, OUT)


def test_numbers_alone_need_no_operator():
    x, trained = torch.randn(3), torch.randn(3, requires_grad=True)
    assert can_skip_operator(x, None, nn.Parameter(x, requires_grad=False))
    assert can_skip_operator(MarkedParameter(x, requires_grad=False))
    assert not can_skip_operator(x, trained)
    assert not can_skip_operator(nn.Parameter(x))
    with torch.no_grad():
        assert can_skip_operator(x, trained)
    with torch.inference_mode():
        assert can_skip_operator(x, trained)
    assert not can_skip_operator(x.as_subclass(Subclass))
    assert not can_skip_operator(nn.UninitializedParameter(requires_grad=False))


def test_transforms_tracers_and_dual_numbers_need_the_operator():
    found = []

    def look(x: Tensor) -> Tensor:
        found.append(can_skip_operator(x))
        return x + 1

    x = torch.randn(3)
    torch.func.vmap(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    with forward_ad.dual_level():
        look(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        look(x)
    assert len(found) == 4
    assert not any(found)
    look(x)
    assert found.pop()
