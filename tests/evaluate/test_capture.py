"""capture: against the divergence computed by torch, and its edges."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from peft_quantlayers.evaluate import capture

VOCABULARY = 11


def table_model(seed: int):
    table = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return lambda ids: table[ids]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (70,), generator=torch.Generator().manual_seed(9))


def test_the_numbers_are_torchs_mean_divergence_and_loss(ids):
    adapter, base, merged = (table_model(seed) for seed in range(3))
    retained = capture(adapter, base, merged, ids, window=16)
    inputs, targets = ids[:64].view(4, 16)[:, :-1].flatten(), ids[:64].view(4, 16)[:, 1:].flatten()

    def divergence(other) -> Tensor:
        logs = (other(inputs).log_softmax(-1), adapter(inputs).log_softmax(-1))
        return kl_div(*logs, log_target=True, reduction="batchmean")

    assert retained.n_tokens == 60
    assert retained.kl_adapter_base == pytest.approx(divergence(base).item(), rel=1e-5)
    assert retained.kl_adapter_merged == pytest.approx(divergence(merged).item(), rel=1e-5)
    assert retained.capture == pytest.approx(1 - (divergence(merged) / divergence(base)).item(), rel=1e-5)
    for model, loss in ((base, retained.loss_base), (adapter, retained.loss_adapter), (merged, retained.loss_merged)):
        assert loss == pytest.approx(cross_entropy(model(inputs), targets).item(), rel=1e-5)


def test_all_is_one_and_nothing_is_zero(ids):
    adapter, base = table_model(0), table_model(1)
    assert capture(adapter, base, adapter, ids, window=16).capture == pytest.approx(1.0, abs=1e-6)
    assert capture(adapter, base, base, ids, window=16).capture == 0.0
    assert capture(base, base, base, ids, window=16).capture == 1.0
    assert capture(base, base, adapter, ids, window=16).capture == float("-inf")


def test_max_windows_scores_the_first_ones_only(ids):
    models = [table_model(seed) for seed in range(3)]
    assert capture(*models, ids, window=16, max_windows=2) == capture(*models, ids[:32], window=16)


@pytest.mark.parametrize(("n", "window", "match"), [(10, 16, "10"), (10, 1, "window=1")])
def test_too_short_a_text_and_too_small_a_window_are_refused(n, window, match, ids):
    with pytest.raises(ValueError, match=match):
        capture(*[table_model(0)] * 3, ids[:n], window=window)
