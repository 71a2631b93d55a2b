"""Perplexity against values computed by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from peft_quantlayers.evaluate import divergence, perplexity


class NextIsTwiceAsLikely(torch.nn.Module):
    """Over 4 tokens: gives ``(last + 1) % 4`` probability 0.4, every other token 0.2."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[int]] = []

    def forward(self, ids, use_cache):
        assert not self.training
        self.seen.append(ids[0].tolist())
        likelihood = torch.full((*ids.shape, 4), 0.2).scatter(2, ((ids + 1) % 4)[..., None], 0.4)
        return SimpleNamespace(logits=likelihood.log())


def test_a_perfectly_expected_text():
    assert perplexity(NextIsTwiceAsLikely(), torch.arange(8) % 4, window=4) == pytest.approx(1 / 0.4)


def test_it_is_the_inverse_geometric_mean_of_the_likelihoods():
    # Windows [0 1 1] and [2 3 2]: one expected and one unexpected token each; the 3 at the end fills no window.
    text = torch.tensor([0, 1, 1, 2, 3, 2, 3])
    expected = math.exp(-(2 * math.log(0.4) + 2 * math.log(0.2)) / 4)
    assert perplexity(NextIsTwiceAsLikely(), text, window=3) == pytest.approx(expected)


def test_max_windows_takes_the_first():
    model = NextIsTwiceAsLikely()
    assert perplexity(model, torch.tensor([0, 1, 2, 0, 0, 0]), window=3, max_windows=1) == pytest.approx(1 / 0.4)
    assert model.seen == [[0, 1, 2]]


def test_a_comparison_gives_the_perplexities_of_both_in_one_pass():
    model, reference = NextIsTwiceAsLikely().eval(), NextIsTwiceAsLikely().eval()
    text = torch.tensor([0, 1, 1, 2, 3, 2, 3])
    found = divergence(model, reference, text, window=3, progress=False)
    assert found.perplexity == found.reference_perplexity == perplexity(reference, text, window=3)
    assert len(model.seen) == 2


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_put_back(training):
    model = NextIsTwiceAsLikely().train(training)
    perplexity(model, torch.arange(4), window=2)
    assert model.training is training


@pytest.mark.parametrize(
    ("options", "message"),
    [({"window": 5}, "4 tokens"), ({"window": 1}, "window=1"), ({"window": 2, "max_windows": 0}, "max_windows=0")],
)
def test_what_cannot_be_scored_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        perplexity(NextIsTwiceAsLikely(), torch.arange(4), **options)
