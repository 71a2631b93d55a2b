"""A mixture of experts that is trained for seconds: what random weights cannot show about calibration and merging."""

import copy

import pytest
import torch
from _trained_mixture import TARGETS, new_mixture, texts, train
from peft import LoraConfig, get_peft_model

import peft_quantlayers as pql
from peft_quantlayers.evaluate import capture, divergence, perplexity, routing_agreement

VOCABULARY, WINDOW, WINDOWS = 384, 128, 24
CONFIG = pql.HQQConfig(nbits=2, group_size=32)


@pytest.fixture(scope="module")
def texts_of_both_kinds():
    return texts(VOCABULARY)


@pytest.fixture(scope="module")
def mixture(texts_of_both_kinds):
    model = new_mixture(
        seed=0, vocabulary=VOCABULARY, hidden_size=128, moe_intermediate_size=64, num_hidden_layers=2, num_experts=4
    )
    return train(model, texts_of_both_kinds[0].train, steps=150, lr=5e-3, tokens=64)


def quantized(model, text):
    calibration = None if text is None else pql.Calibration(data=text, n_tokens=8192, sequence_length=WINDOW)
    return pql.quantize_model(copy.deepcopy(model), CONFIG, calibration=calibration, progress=False).eval()


@pytest.fixture(scope="module")
def base(mixture, texts_of_both_kinds):
    return quantized(mixture, texts_of_both_kinds[0].train)


def test_calibration_halves_the_divergence_and_keeps_more_tokens_with_their_experts(
    mixture, base, texts_of_both_kinds
):
    ids = texts_of_both_kinds[0].held_out
    options = {"window": WINDOW, "max_windows": WINDOWS, "progress": False}
    assert perplexity(mixture, ids, **options) < VOCABULARY / 5  # it has learned something
    plain = quantized(mixture, None)
    kl, routing = (
        [measure(model, mixture, ids, **options) for model in (plain, base)]
        for measure in (divergence, routing_agreement)
    )
    assert kl[1].kl < 0.6 * kl[0].kl
    assert routing[1].total > routing[0].total
    assert min(routing[1].per_layer.values()) > 0.8


def test_an_adapter_on_experts_and_attention_survives_its_merge(base, texts_of_both_kinds):
    code = texts_of_both_kinds[1]
    torch.manual_seed(0)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, lora_alpha=16, **TARGETS))
    train(adapted, code.train, steps=40, lr=5e-3, tokens=64)
    found = {}
    for strategy in ("requantize", "calibrated", "keep"):
        data = pql.Calibration(data=code.train, n_tokens=8192, sequence_length=WINDOW)
        merged, _ = pql.merge_back(
            copy.deepcopy(adapted),
            strategy=strategy,
            calibration=data if strategy == "calibrated" else None,
            progress=False,
        )
        merged.eval()
        found[strategy] = capture(
            lambda ids: adapted(ids, use_cache=False).logits,
            lambda ids: base(ids, use_cache=False).logits,
            lambda ids, merged=merged: merged(ids, use_cache=False).logits,
            code.held_out,
            window=WINDOW,
            max_windows=WINDOWS,
        )
    assert found["keep"].loss_base - found["keep"].loss_adapter > 0.2
    assert found["keep"].capture > 0.999
    assert found["requantize"].gain_retained > 0.95
    assert found["calibrated"].gain_retained > 0.97
    assert found["calibrated"].kl_adapter_merged < 0.3 * found["requantize"].kl_adapter_merged
