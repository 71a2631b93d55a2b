"""The report on a model: totals over its layers, as numbers, as JSON and as text."""

import dataclasses
import json

import pytest
from plans import layer_report_of

from peft_quantlayers import MergeReport
from peft_quantlayers.evaluate import Capture

LARGE = layer_report_of(
    "calibrated", name="large", n_weights=300, bits_before=4.0, bits_after=5.0, weight_norm=8.0, delta_norm=3.0,
    error_norm=4.0, delta_retained=1.0, output_retained=0.8, output_noise=0.2,
)  # fmt: skip
SMALL = layer_report_of(
    "keep", name="small", n_weights=100, bits_before=8.0, bits_after=9.0, weight_norm=6.0, delta_norm=4.0,
    error_norm=3.0, delta_retained=0.5,
)  # fmt: skip
REPORT = MergeReport(strategy="auto", layers=(LARGE, SMALL))


def test_totals_are_over_all_weights_together():
    assert REPORT.bits == (5.0, 6.0)
    assert REPORT.relative_error == pytest.approx(5.0 / 10.0)
    assert REPORT.error_to_delta == pytest.approx(5.0 / 5.0)
    assert REPORT.delta_retained == pytest.approx((1.0 * 9 + 0.5 * 16) / 25)
    assert (REPORT.output_retained, REPORT.output_noise) == (0.8, 0.2)  # of the layers that have one
    assert LARGE.relative_error == 0.5


def test_a_model_without_layers_or_without_a_delta_has_lost_nothing():
    empty = MergeReport(strategy="auto", layers=())
    assert empty.bits == (0.0, 0.0)
    assert (empty.relative_error, empty.error_to_delta, empty.delta_retained) == (0.0, 0.0, 1.0)
    assert empty.output_retained is empty.output_noise is empty.recommendation is empty.not_measured is None
    assert "no quantized layer" in str(empty)
    still = MergeReport(strategy="auto", layers=(layer_report_of(delta_norm=0.0, error_norm=0.0, weight_norm=0.0),))
    assert (still.delta_retained, still.error_to_delta, still.relative_error) == (1.0, 0.0, 0.0)


def test_the_file_holds_totals_and_layers(tmp_path):
    capture = Capture(
        kl_adapter_base=1.0, kl_adapter_merged=0.25, loss_base=2.0, loss_adapter=1.0, loss_merged=1.5, n_tokens=8
    )
    report = MergeReport(strategy="auto", layers=REPORT.layers, capture=capture, scores=(0.75, 0.5))
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert (stored["bits_before"], stored["bits_after"]) == (5.0, 6.0)
    assert stored["capture"]["capture"] == pytest.approx(0.75)
    assert stored["scores"] == {"adapter": 0.75, "merged": 0.5}
    assert [layer["name"] for layer in stored["layers"]] == ["large", "small"]
    assert stored["layers"][0]["relative_error"] == 0.5
    for name in ("delta_retained", "error_to_delta", "output_retained", "output_noise", "recommendation"):
        assert stored[name] == getattr(report, name)


def test_the_text_has_a_line_for_each_layer_and_the_total():
    lines = str(REPORT).splitlines()
    assert lines[0] == "merged: calibrated, keep"
    assert [line.split()[0] for line in lines[1:5]] == ["layer", "large", "small", "total"]
    assert REPORT.recommendation in lines
    assert "score 0.750 adapter, 0.500 merged" in str(
        MergeReport(strategy="auto", layers=(LARGE,), scores=(0.75, 0.5))
    )
    assert report_lines(REPORT.table()) == ["layer", "large", "small", "total"]
    aware = MergeReport(strategy="auto", layers=(layer_report_of("aware", is_merge_aware=True),))
    assert "The outputs are those that were trained" in str(aware)


def report_lines(text: str) -> list[str]:
    return [line.split()[0] for line in text.splitlines()]


CAPTURE = Capture(
    kl_adapter_base=1.0, kl_adapter_merged=0.074, loss_base=2.587, loss_adapter=2.320, loss_merged=2.457, n_tokens=1020
)


@pytest.mark.parametrize("capture", [None, CAPTURE])
@pytest.mark.parametrize("scores", [None, (0.75, 0.5)])
@pytest.mark.parametrize("n_layers", [1, 6, 7, 200])
def test_a_printed_report_has_ten_lines_and_the_worst_layers(n_layers, scores, capture):
    layers = tuple(
        layer_report_of(
            "requantize", name=f"layers.{index}", output_retained=0.2 if index % 50 == 3 else 0.9, output_noise=0.1
        )
        for index in range(n_layers)
    )
    report = MergeReport(strategy="auto", layers=layers, capture=capture, scores=scores)
    text = str(report)
    assert len(text.splitlines()) <= 10
    assert len(report.table().splitlines()) == n_layers + 2
    if n_layers == 200:
        assert len(text.splitlines()) == 10
        shown = [name for name in report_lines(text) if name.startswith("layers.")]
        assert set(shown[:4]) >= {"layers.3", "layers.53"}
        assert f"and {200 - len(shown)} layers that lost less: report.table()" in text
    else:
        assert all(layer.name in text for layer in layers) or n_layers > 1


def test_what_is_left_of_the_gain_in_loss_stands_beside_capture():
    report = MergeReport(strategy="auto", layers=(LARGE,), capture=CAPTURE)
    assert (
        "capture 0.926; 0.49 of the adapter's gain in loss is left: loss 2.587 base, 2.320 adapter, 2.457 merged; "
        "on 1,020 tokens"
    ) in str(report)
    assert report.to_dict()["capture"]["gain_retained"] == pytest.approx(0.487, abs=1e-3)
    assert report.recommendation.startswith("0.49 of the adapter's gain in loss is left")
    flat = dataclasses.replace(CAPTURE, loss_adapter=2.586)
    assert flat.gain_retained is None
    assert "lowers the loss by less than 0.01: loss 2.587 base" in str(
        MergeReport(strategy="auto", layers=(LARGE,), capture=flat)
    )


def test_an_adapter_that_changes_nothing_is_said_to():
    still = MergeReport(strategy="auto", layers=(layer_report_of(delta_norm=0.0, error_norm=0.0),))
    said = "merging changed no weight. Was the adapter trained?"
    assert str(still).count(said) == 1
    assert said not in str(REPORT)
