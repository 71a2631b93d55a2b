"""Frozen layers with LoRA: the numbers of their composed form, with little kept, alone and for a shared input."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from quantlayers_kernels.branch_products import Branch, add_branches
from quantlayers_kernels.frozen_linear import FrozenLinear, lora_linears

IN, TOKENS = 16, (3, 5)


def layer(
    out_features: int, *, ranks: tuple[int, ...] = (4,), dtype: torch.dtype, factors: torch.dtype, bias: bool = True
) -> tuple[FrozenLinear, Tensor]:
    """A layer that dequantizes nothing, in two tiles, and its weight."""

    def draw(*size: int, of: torch.dtype) -> Tensor:
        return torch.randn(*size).to(of).requires_grad_()

    weight = torch.randn(out_features, IN).to(dtype)
    trained = draw(out_features, of=dtype) if bias else None
    branches = [
        Branch(A=draw(r, IN, of=factors), B=draw(out_features, r, of=factors), scaling=0.7 - 0.2 * i)
        for i, r in enumerate(ranks)
    ]
    halves = (slice(0, out_features // 2), slice(out_features // 2, out_features))
    return FrozenLinear(
        multiply=lambda x: linear(x.to(dtype), weight, trained).to(x.dtype),
        tiles=lambda dtype: ((rows, weight[rows].to(dtype)) for rows in halves),
        dtype=dtype,
        bias=trained,
        branches=branches,
    ), weight


def layers(dtype: torch.dtype, factors: torch.dtype) -> tuple[list[FrozenLinear], list[Tensor]]:
    """Three that read the same input: one adapter, none, and two of different ranks."""
    torch.manual_seed(0)
    made = [
        layer(24, dtype=dtype, factors=factors),
        layer(8, ranks=(), dtype=dtype, factors=factors, bias=False),
        layer(12, ranks=(2, 5), dtype=dtype, factors=factors),
    ]
    return [each for each, _ in made], [weight for _, weight in made]


def composed(x: Tensor, of: FrozenLinear, weight: Tensor) -> Tensor:
    y = linear(x.to(of.dtype), weight, of.bias).to(x.dtype)
    for branch in of.branches:
        y = y + ((x.to(branch.A.dtype) @ branch.A.t() @ branch.B.t()) * branch.scaling).to(y.dtype)
    return y


def trained(of: list[FrozenLinear]) -> list[Tensor]:
    factors = [factor for each in of for branch in each.branches for factor in (branch.A, branch.B)]
    return [each.bias for each in of if each.bias is not None] + factors


@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), ()], ids=str)
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.05),
        (torch.bfloat16, torch.bfloat16, 0.05),
        (torch.float64, torch.float64, 1e-12),
    ],
)
def test_values_and_gradients_are_those_of_the_composed_form(dtype, factors, tolerance, shape):
    of, weights = layers(dtype, factors)
    x = torch.randn(*shape, IN).to(dtype).requires_grad_()
    expected = [composed(x, each, weight) for each, weight in zip(of, weights, strict=True)]
    grads = [torch.randn(y.shape).to(dtype) for y in expected]
    wanted = torch.autograd.grad(expected, [x, *trained(of)], grads)
    found = lora_linears(x, of)
    for y, truth in zip(found, expected, strict=True):
        assert y.dtype == dtype
        torch.testing.assert_close(y, truth, rtol=tolerance, atol=4 * tolerance)
    for gradient, truth in zip(torch.autograd.grad(found, [x, *trained(of)], grads), wanted, strict=True):
        assert gradient.dtype == truth.dtype
        assert gradient.shape == truth.shape
        # Sums of bfloat16 round at the size of what was added, which may cancel.
        torch.testing.assert_close(
            gradient, truth, rtol=tolerance, atol=tolerance * (4 + truth.abs().amax().item() if truth.numel() else 4)
        )


def test_first_derivatives_are_right_and_second_ones_are_refused():
    of, _ = layers(torch.float64, torch.float64)
    x = torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, *_: lora_linears(x, of), (x, *trained(of)))
    (gradient,) = torch.autograd.grad(lora_linears(x, of)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_unused_result_and_frozen_tensors_get_no_gradient():
    of, weights = layers(torch.float64, torch.float64)
    x = torch.randn(*TOKENS, IN, dtype=torch.float64, requires_grad=True)
    of[2].branches[0].A.requires_grad_(False)
    of[2].bias.requires_grad_(False)
    wanted = [each for each in [x, *trained(of)] if each.requires_grad]
    expected = torch.autograd.grad(composed(x, of[2], weights[2]).sum(), wanted, allow_unused=True)
    found = torch.autograd.grad(lora_linears(x, of)[2].sum(), wanted, allow_unused=True)
    assert [gradient is None for gradient in found] == [truth is None for truth in expected]
    for gradient, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, truth)


def test_an_input_that_takes_no_gradient_costs_no_product_with_the_weight():
    of, weights = layers(torch.float64, torch.float64)

    def refuse(dtype):
        raise AssertionError("the weight was asked for")

    of = [each._replace(tiles=refuse) for each in of]
    x = torch.randn(*TOKENS, IN, dtype=torch.float64)
    found = torch.autograd.grad(sum(y.sum() for y in lora_linears(x, of)), trained(of))
    expected = sum(composed(x, each, weight).sum() for each, weight in zip(of, weights, strict=True))
    for gradient, truth in zip(found, torch.autograd.grad(expected, trained(of)), strict=True):
        torch.testing.assert_close(gradient, truth)


def with_dropout(of: list[FrozenLinear], *rates: float) -> list[FrozenLinear]:
    rate = iter(rates)
    return [each._replace(branches=[b._replace(dropout=next(rate)) for b in each.branches]) for each in of]


def test_dropout_is_the_same_forward_and_backward_and_each_branch_has_its_own():
    of, weights = layers(torch.float64, torch.float64)
    of = with_dropout(of, 0.25, 0.0, 0.5)
    x = torch.randn(400, IN, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(1)
    found = lora_linears(x, of)
    torch.manual_seed(1)
    masks = [torch.empty(x.shape, dtype=torch.bool).bernoulli_(p).double() / p for p in (0.75, 0.5)]
    inputs = [[x * masks[0]], [], [x, x * masks[1]]]
    expected = []
    for each, weight, dropped in zip(of, weights, inputs, strict=True):
        y = composed(x, each._replace(branches=[]), weight)
        for branch, part in zip(each.branches, dropped, strict=True):
            y = y + part @ branch.A.t() @ branch.B.t() * branch.scaling
        expected.append(y)
    grads = [torch.randn_like(y) for y in expected]
    for y, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(y, truth)
    gradients = torch.autograd.grad(found, [x, *trained(of)], grads)
    for gradient, truth in zip(gradients, torch.autograd.grad(expected, [x, *trained(of)], grads), strict=True):
        torch.testing.assert_close(gradient, truth)


def test_dropping_everything_leaves_the_layer_alone():
    of, weights = layers(torch.float32, torch.float32)
    x = torch.randn(*TOKENS, IN)
    found = lora_linears(x, with_dropout(of, 1.0, 1.0, 1.0))
    for y, each, weight in zip(found, of, weights, strict=True):
        torch.testing.assert_close(y, composed(x, each._replace(branches=[]), weight))


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_inputs_and_gradients_that_are_not_contiguous_are_taken(dropout):
    of, _ = layers(torch.float32, torch.float32)
    of = with_dropout(of, dropout, dropout, dropout)
    x = torch.randn(5, 3, IN).transpose(0, 1).requires_grad_()

    def run(x: Tensor, turned: bool) -> list[Tensor]:
        torch.manual_seed(0)
        ys = lora_linears(x, of)
        grads = [torch.ones(y.shape[-1], *y.shape[:-1]).cumsum(0).permute(1, 2, 0) for y in ys]
        grads = grads if turned else [grad.contiguous() for grad in grads]
        return [*ys, *torch.autograd.grad(ys, [x, *trained(of)], grads)]

    for found, expected in zip(run(x, True), run(x.detach().contiguous().requires_grad_(), False), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_autocast_gives_its_dtype_to_the_products():
    of, _ = layers(torch.bfloat16, torch.float32)
    x = torch.randn(*TOKENS, IN).bfloat16().requires_grad_()
    kept = []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t),
    ):
        found = lora_linears(x, of)
    assert {y.dtype for y in found} == {torch.bfloat16}
    sum(y.sum() for y in found).backward()
    assert {each.grad.dtype for each in trained(of) if each is not of[0].bias and each is not of[2].bias} == {
        torch.float32
    }


def test_a_factor_that_was_written_to_since_the_forward_pass_is_refused():
    of, _ = layers(torch.float32, torch.float32)
    y = lora_linears(torch.randn(*TOKENS, IN, requires_grad=True), of)[0]
    with torch.no_grad():
        of[0].branches[0].B.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("shape", [(1, 1), (), (3, 5), (0, 4)], ids=str)
@pytest.mark.parametrize(
    ("dtype", "factors", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 0.05),
        (torch.float32, torch.bfloat16, 0.05),
        (torch.bfloat16, torch.bfloat16, 0.05),
        (torch.float64, torch.float64, 1e-12),
    ],
)
def test_without_gradients_the_values_are_those_of_the_autograd_function(dtype, factors, tolerance, shape):
    of, weights = layers(dtype, factors)
    x = torch.randn(*shape, IN).to(dtype)
    expected = lora_linears(x, of)
    with torch.no_grad():
        found = lora_linears(x, of)
        alone = [
            add_branches(linear(x.to(dtype), weight, each.bias), x, each.branches)
            for each, weight in zip(of, weights, strict=True)
        ]
    for y, other, truth in zip(found, alone, expected, strict=True):
        assert y.dtype == dtype
        assert not y.requires_grad
        assert truth.requires_grad or truth.shape[-1] == 8  # the layer without trained parts
        assert torch.equal(y, other)
        torch.testing.assert_close(y, truth.detach(), rtol=tolerance, atol=4 * tolerance)


def test_one_token_takes_two_products_a_branch_and_no_stacking():
    of, _ = layers(torch.float32, torch.float32)
    x = torch.randn(1, 1, IN)
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiled:
        y = torch.zeros(1, 1, 12)
        add_branches(y, x, of[2].branches)
    names = [event.name for event in profiled.events()]
    assert names.count("aten::mv") == len(of[2].branches) == 2
    assert not {"aten::mm", "aten::cat", "aten::addmm_"}.intersection(names)


def test_adapters_that_are_frozen_need_no_autograd_function():
    of, weights = layers(torch.float32, torch.float32)
    for each in trained(of):
        each.requires_grad_(False)
    x = torch.randn(*TOKENS, IN)
    for y, each, weight in zip(lora_linears(x, of), of, weights, strict=True):
        assert y.grad_fn is None
        torch.testing.assert_close(y, composed(x, each, weight))


def test_dropout_without_gradients_draws_as_with_them():
    of, _ = layers(torch.float32, torch.float32)
    of = with_dropout(of, 0.25, 0.0, 0.5)
    x = torch.randn(40, IN)
    torch.manual_seed(1)
    expected = lora_linears(x, of)
    torch.manual_seed(1)
    with torch.no_grad():
        found = lora_linears(x, of)
    for y, truth in zip(found, expected, strict=True):
        assert torch.equal(y, truth.detach())
