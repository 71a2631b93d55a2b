"""All experts and their branches as one autograd function, against the same made of plain operators, in float64."""

import pytest
import torch

from quantlayers_kernels.branch_products import Branch
from quantlayers_kernels.frozen_experts import FrozenExperts, expert_rows, lora_experts

COUNTS = [3, 0, 5, 1]
IN, OUT = 12, 7


def weights() -> torch.Tensor:
    return torch.randn(len(COUNTS), OUT, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def experts(weight: torch.Tensor, counts=COUNTS) -> FrozenExperts:
    def each(x, turned):
        parts = [x[rows] @ (weight[e].t() if turned else weight[e]).to(x.dtype) for e, rows in expert_rows(counts)]
        return torch.cat(parts) if parts else x.new_empty(0, OUT if turned else IN)

    return FrozenExperts(multiply=lambda x: each(x, True), input_gradient=lambda g: each(g, False), counts=counts)


def branch(rank: int, seed: int, *, scaling=0.5, dropout=0.0, dtype=torch.float64) -> Branch:
    generator = torch.Generator().manual_seed(seed)
    A, B = (
        torch.randn(len(COUNTS), *sides, dtype=dtype, generator=generator).requires_grad_()
        for sides in ((rank, IN), (OUT, rank))
    )
    return Branch(A, B, scaling, dropout)


def inputs(dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(sum(COUNTS), IN, dtype=dtype, generator=generator).requires_grad_()


def plain(x: torch.Tensor, weight: torch.Tensor, branches: list[Branch]) -> torch.Tensor:
    parts = []
    for e, rows in expert_rows(COUNTS):
        y = x[rows] @ weight[e].t()
        for A, B, scaling, _ in branches:
            y = y + scaling * (x[rows] @ A[e].t()) @ B[e].t()
        parts.append(y)
    return torch.cat(parts)


def test_rows_of_experts_follow_each_other():
    assert list(expert_rows(COUNTS)) == [(0, slice(0, 3)), (2, slice(3, 8)), (3, slice(8, 9))]
    assert list(expert_rows([0, 0])) == []


@pytest.mark.parametrize("n_branches", [0, 1, 2])
def test_results_and_gradients_are_those_of_plain_operators(n_branches):
    branches = [branch(2 + i, seed=i, scaling=0.5 + i) for i in range(n_branches)]
    x, grad = inputs(), torch.randn(sum(COUNTS), OUT, dtype=torch.float64)
    floats = [x, *(factor for each in branches for factor in (each.A, each.B))]
    y, wanted = lora_experts(x, experts(weights()), branches), plain(x, weights(), branches)
    torch.testing.assert_close(y, wanted)
    found = torch.autograd.grad(y, floats, grad)
    for ours, theirs in zip(found, torch.autograd.grad(wanted, floats, grad), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen):
    found = []
    for is_frozen in (False, True):
        x, its = inputs(), branch(3, seed=4)
        tensors = {"x": x, "A": its.A, "B": its.B}
        tensors[frozen].requires_grad_(not is_frozen)
        lora_experts(x, experts(weights()), [its]).square().sum().backward()
        found.append({name: tensor.grad for name, tensor in tensors.items()})
    assert found[1].pop(frozen) is None
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, found[0][name])


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    its = branch(2, seed=1)
    lora_experts(inputs(), experts(weights()), [its]).sum().backward()
    assert not its.A.grad[1].any()
    assert not its.B.grad[1].any()
    assert its.A.grad[0].any()


def test_dropout_drops_the_same_numbers_in_both_passes():
    its = branch(2, seed=1, dropout=0.5)
    x = inputs()
    torch.manual_seed(3)
    y = lora_experts(x, experts(weights()), [its])
    grads = torch.autograd.grad(y.square().sum(), [x, its.A, its.B])
    torch.manual_seed(3)
    mask = torch.empty(x.shape, dtype=torch.bool).bernoulli_(0.5)
    kept = x * mask * 2
    wanted = torch.cat(
        [
            x[rows] @ weights()[e].t() + 0.5 * (kept[rows] @ its.A[e].t()) @ its.B[e].t()
            for e, rows in expert_rows(COUNTS)
        ]
    )
    torch.testing.assert_close(y, wanted)
    for ours, theirs in zip(grads, torch.autograd.grad(wanted.square().sum(), [x, its.A, its.B]), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_tokens_at_all():
    its = branch(2, seed=1)
    x = torch.empty(0, IN, dtype=torch.float64, requires_grad=True)
    y = lora_experts(x, experts(weights(), [0] * len(COUNTS)), [its])
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert not its.A.grad.any()


def test_the_input_is_saved_once_and_no_dense_weight():
    x, its = inputs(), branch(2, seed=1)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_experts(x, experts(weights()), [its, branch(3, seed=2)])
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    factors = sum(f.nbytes for b in (its, branch(3, seed=2)) for f in (b.A, b.B))
    assert sum(storages.values()) == x.nbytes + factors + (2 + 3) * sum(COUNTS) * 8


def test_halves_and_factors_of_another_dtype_are_cast():
    its = branch(2, seed=1, dtype=torch.float32)
    x = inputs(torch.bfloat16)
    y = lora_experts(x, experts(weights()), [its])
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert its.A.grad.dtype == torch.float32
    wanted = plain(x.detach().double(), weights().bfloat16().double(), [Branch(its.A.double(), its.B.double(), 0.5)])
    assert (y.double() - wanted).norm() < 2e-2 * wanted.norm()
