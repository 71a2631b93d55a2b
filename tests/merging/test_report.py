"""The report on a model: totals over its layers, as numbers, as JSON and as text."""

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
    aware = MergeReport(strategy="auto", layers=(layer_report_of("aware", is_merge_aware=True),))
    assert "The outputs are those that were trained" in str(aware)
