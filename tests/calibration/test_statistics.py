"""Statistics of inputs: each equals its definition, whatever is asked for with it, in bounded memory."""

import pytest
import torch

from peft_quantlayers.calibration import InputStatistics
from peft_quantlayers.calibration import statistics as module
from peft_quantlayers.calibration.statistics import STATISTICS, PairedInput, collect

X = torch.randn(700, 6, generator=torch.Generator().manual_seed(0))
X_FLOAT = X + 0.1 * torch.randn(700, 6, generator=torch.Generator().manual_seed(1))
PARTS = [
    PairedInput(x.view(shape), y.view(shape))
    for x, y, shape in zip(
        X.split((300, 1, 399)), X_FLOAT.split((300, 1, 399)), ((3, 100, 6), (1, 6), (3, 133, 6)), strict=True
    )
]
FIRST_HALF = torch.cat([torch.arange(150), torch.arange(301, 500)])
# All that stands for itself.
WHOLE = tuple(name for name in STATISTICS if name != "first_half")
DEFINITIONS = {
    "second_moment": X.t() @ X / 700,
    "deviation_moment": (X_FLOAT - X).t() @ X / 700,
    "mean_square": X.square().mean(0),
    "max_abs": X.abs().amax(0),
    "mean_abs": X.abs().mean(0),
    "inputs": X,
}


@pytest.mark.parametrize("tokens_at_a_time", [7, 8192])
@pytest.mark.parametrize("name", WHOLE)
def test_each_statistic_is_its_definition_and_comes_alone(name, tokens_at_a_time, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_A_TIME", tokens_at_a_time)
    found = collect(PARTS, (name,))
    assert found.n_tokens == 700
    torch.testing.assert_close(getattr(found, name), DEFINITIONS[name], rtol=1e-4, atol=1e-5)
    assert all(getattr(found, other) is None for other in STATISTICS if other != name)
    together = collect(PARTS, WHOLE)
    assert all(torch.equal(getattr(collect(PARTS, (each,)), each), getattr(together, each)) for each in WHOLE)


@pytest.mark.parametrize("tokens_at_a_time", [7, 8192])
def test_halves_are_the_same_statistics_of_two_parts_of_every_call(tokens_at_a_time, monkeypatch):
    monkeypatch.setattr(module, "TOKENS_AT_A_TIME", tokens_at_a_time)
    found = collect(PARTS, STATISTICS)
    for name in WHOLE:
        torch.testing.assert_close(getattr(found, name), DEFINITIONS[name], rtol=1e-4, atol=1e-5)
    first, second = found.halves()
    is_first = torch.zeros(700, dtype=torch.bool).index_fill(0, FIRST_HALF, True)
    for half, rows in ((first, is_first), (second, ~is_first)):
        x, n = X[rows], int(rows.sum())
        assert half.n_tokens == n
        torch.testing.assert_close(half.second_moment, x.t() @ x / n, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(half.deviation_moment, (X_FLOAT[rows] - x).t() @ x / n, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(half.mean_square, x.square().mean(0), rtol=1e-4, atol=1e-5)


def test_no_halves_without_asking_and_of_single_tokens():
    assert collect(PARTS, ("second_moment",)).halves() is None
    assert collect([X[:1], X[1:2]], ("second_moment", "first_half")).halves() is None


def test_one_input_that_is_not_known_in_the_unchanged_model_leaves_no_deviation():
    parts = [PARTS[0], PairedInput(X[300:301], None), PARTS[2]]
    found = collect(parts, STATISTICS)
    assert found.deviation_moment is None
    torch.testing.assert_close(found.second_moment, DEFINITIONS["second_moment"], rtol=1e-4, atol=1e-5)


def test_half_precision_inputs_are_added_up_in_float32():
    x = torch.full((5000, 2), 1 + 2**-7, dtype=torch.bfloat16)
    for name in set(WHOLE) - {"deviation_moment"}:
        found = getattr(collect([x], (name,)), name)
        assert found.dtype == torch.float32
        expected = float(x[0, 0]) ** (2 if name in ("second_moment", "mean_square") else 1)
        # In bfloat16 the sums would end at 256, or be wrong by a 256th; a product of matrices in float32 by 5e-5.
        torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("size", [1, 37, 1000])
def test_kept_inputs_are_bounded_and_spread_evenly(size, monkeypatch):
    monkeypatch.setattr(module, "MAX_KEPT_TOKENS", 50)
    x = torch.arange(1000.0).view(-1, 1) + 1
    kept = collect(x.split(size), ("inputs",)).inputs.flatten()
    assert 25 < len(kept) <= 50
    assert kept[0] == 1
    assert set(kept.diff().tolist()) == {32.0}


@pytest.mark.parametrize("wanted", [(), *[(name,) for name in STATISTICS], STATISTICS])
def test_no_tokens_and_only_zeros_are_no_statistics(wanted):
    assert collect([], wanted) is None
    assert collect([torch.zeros(4, 3), torch.zeros(1, 3)], wanted) is None
    assert collect([torch.zeros(4, 3), torch.ones(1, 3)], wanted).n_tokens == 5


def test_a_hessian_is_damped_and_shrunk_and_leaves_the_moment():
    moment = DEFINITIONS["second_moment"].clone()
    statistics = InputStatistics(n_tokens=700, second_moment=moment)
    hessian = statistics.hessian(damping=0.5, shrinkage=0.25)
    expected = 0.75 * moment + torch.diag(0.25 * moment.diagonal() + 0.5 * moment.diagonal().mean())
    torch.testing.assert_close(hessian, expected)
    assert torch.equal(moment, DEFINITIONS["second_moment"])


def test_a_hessian_without_a_second_moment_says_where_to_ask_for_it():
    with pytest.raises(ValueError, match=r"Visitor\.statistics"):
        InputStatistics(n_tokens=3).hessian(damping=0.1)
