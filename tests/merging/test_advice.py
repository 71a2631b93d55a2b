"""What is recommended after a merge, from the layers' reports alone."""

import pytest
from plans import layer_report_of

import peft_quantlayers as pql
from peft_quantlayers.evaluate import Capture
from peft_quantlayers.merging.advice import LOW_CAPTURE, not_measured, nothing_merged, recommendation


def advice(*layers, capture=None, output_retained=None, delta_retained=0.1) -> str | None:
    return recommendation(layers, capture=capture, output_retained=output_retained, delta_retained=delta_retained)


def capture_of(kl_merged: float, kl_base: float = 1.0, loss_merged: float = 1.05) -> Capture:
    return Capture(
        kl_adapter_base=kl_base,
        kl_adapter_merged=kl_merged,
        loss_base=2.0,
        loss_adapter=1.0,
        loss_merged=loss_merged,
        n_tokens=8,
    )


def test_nothing_that_was_just_done_is_recommended():
    for strategy in ("calibrated", "keep", "dense", "requantize"):
        report = pql.MergeReport(strategy=strategy, layers=(layer_report_of(strategy),))
        assert f'strategy="{strategy}"' not in report.recommendation
        assert ("more text" in report.recommendation) == (strategy == "calibrated")
        assert "QA-LoRA" in report.recommendation
    assert "QA-LoRA" not in advice(layer_report_of(can_be_qalora=False))


def test_what_was_measured_nearest_to_the_predictions_decides():
    layer = layer_report_of()
    assert advice(layer, delta_retained=LOW_CAPTURE) is None
    assert advice(layer, delta_retained=0.5).startswith("0.50 of the adapter's delta is in the weights. Instead: ")
    assert advice(layer, output_retained=LOW_CAPTURE) is None
    assert advice(layer, output_retained=0.25, delta_retained=1.0).startswith(
        "0.25 of the adapter's delta in the outputs"
    )
    assert advice(layer, output_retained=0.25, capture=capture_of(0.01)) is None
    assert advice(layer, output_retained=1.0, capture=capture_of(0.4)).startswith("0.60 of the adapter's effect")
    further = advice(layer, output_retained=1.0, capture=capture_of(3.0))
    assert further.startswith("Rounding moved the predictions further than the adapter did. Instead: ")
    # Predictions near those of the adapter, and still much of what it was trained for is lost.
    lost = advice(layer, output_retained=1.0, capture=capture_of(0.07, loss_merged=1.5))
    assert lost.startswith("0.50 of the adapter's gain in loss is left. Instead: ")
    # An effect that is too small to measure says nothing.
    assert advice(layer, capture=capture_of(0.0, kl_base=0.0), delta_retained=0.5).startswith(
        "0.50 of the adapter's delta"
    )


def test_only_what_fits_every_layer_is_recommended():
    layers = layer_report_of(strategies=("keep", "append")), layer_report_of(strategies=("append", "calibrated"))
    said = advice(*layers)
    assert 'strategy="append"' in said
    assert not any(f'strategy="{name}"' in said for name in ("keep", "calibrated", "aware"))
    assert 'strategy="dense"' in said
    assert 'strategy="dense"' not in advice(layer_report_of(strategies=("keep",)))


def test_merge_aware_adapters_are_sent_to_the_merge_that_they_were_trained_for():
    assert 'only strategy="aware"' in advice(layer_report_of(is_merge_aware=True), delta_retained=1.0)
    assert advice(layer_report_of("aware", is_merge_aware=True)) is None
    said = advice(layer_report_of("aware", is_merge_aware=True), capture=capture_of(0.5))
    assert said == "0.50 of the adapter's effect on the predictions is left."


@pytest.mark.parametrize(
    ("strategies", "noise", "is_said"),
    [
        (("requantize",), 1.0, True),
        (("keep", "calibrated"), 1.0, True),
        (("requantize",), 0.3, False),
        (("keep", "dense", "exact", "aware"), 9.0, False),
        ((), 1.0, False),
    ],
)
def test_noise_that_was_not_measured_is_said(strategies, noise, is_said):
    layers = [layer_report_of(strategy) for strategy in strategies]
    said = not_measured(layers, is_captured=False, noise=noise)
    assert (said is not None) == is_said
    assert said is None or f"noise {noise:.2f} times" in said
    assert not_measured(layers, is_captured=True, noise=noise) is None


def test_a_merge_that_changed_nothing_says_so():
    for strategy in ("requantize", "calibrated", "aware"):
        said = advice(layer_report_of(strategy, delta_norm=0.0), layer_report_of(strategy, delta_norm=0.0))
        assert said.startswith("The delta of all 2 quantized layers with an adapter is zero")
        assert "Was the adapter trained?" in said
    assert "is zero" not in (advice(layer_report_of(delta_norm=0.0), layer_report_of()) or "")
    assert nothing_merged([]).startswith("No quantized weight was merged")
