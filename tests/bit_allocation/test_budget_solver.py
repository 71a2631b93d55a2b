"""The allocation: within the budget to the byte, and no other one within it costs much less."""

import itertools

import pytest
import torch

from peft_quantlayers.bit_allocation.budget_solver import Option, allocate


def drawn(seed: int, n_layers: int = 6, n_options: int = 3) -> dict[str, list[Option]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer {index}": [
            Option(int(n_bytes), float(cost))
            for n_bytes, cost in zip(
                torch.randint(10, 200, (n_options,), generator=generator),
                torch.rand(n_options, generator=generator),
                strict=True,
            )
        ]
        for index in range(n_layers)
    }


def total(options: dict[str, list[Option]], chosen: dict[str, int]) -> Option:
    picked = [options[name][index] for name, index in chosen.items()]
    return Option(sum(option.n_bytes for option in picked), sum(option.cost for option in picked))


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(10))
def test_it_stays_within_the_budget_and_near_the_best_of_all(seed, fraction):
    options = drawn(seed)
    smallest = sum(min(each).n_bytes for each in options.values())
    largest = sum(max(each).n_bytes for each in options.values())
    budget = int(smallest + fraction * (largest - smallest))
    found = total(options, allocate(options, budget))
    every = (
        total(options, dict(zip(options, picked, strict=True)))
        for picked in itertools.product(*(range(len(each)) for each in options.values()))
    )
    best = min(each.cost for each in every if each.n_bytes <= budget)
    assert found.n_bytes <= budget
    steps = max(max(option.cost for option in each) - min(option.cost for option in each) for each in options.values())
    assert best <= found.cost <= best + steps + 1e-9  # the last step of a greedy walk along hulls
    if fraction == 1.0:
        assert found.cost == pytest.approx(best)


def test_a_larger_budget_never_costs_more():
    options = drawn(3, n_layers=20)
    smallest = sum(min(each).n_bytes for each in options.values())
    costs = [total(options, allocate(options, smallest + more)).cost for more in range(0, 4000, 50)]
    assert costs[-1] == pytest.approx(sum(min(option.cost for option in each) for each in options.values()))
    assert costs[-1] < 0.6 * costs[0]
    assert all(after <= before + 0.1 for before, after in itertools.pairwise(costs))


def test_a_budget_below_the_smallest_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"take 10 bytes, and the budget is 9"):
        allocate({"layer": [Option(10, 1.0), Option(20, 0.5)]}, 9)


def test_options_that_are_larger_and_cost_more_are_never_taken():
    options = {"layer": [Option(10, 1.0), Option(20, 2.0), Option(10, 3.0), Option(30, 0.5), Option(40, 0.5)]}
    assert [allocate(options, budget)["layer"] for budget in (10, 25, 1000)] == [0, 0, 3]
