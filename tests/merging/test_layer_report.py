"""Reports of merges: the deprecated names of their fields."""

import copy
import pickle

import pytest

from peft_quantlayers import LayerMergeReport, MergeReport

LAYER = LayerMergeReport(
    name="0",
    adapters=("default",),
    method="hqq",
    strategy="requantize",
    n_weights=64,
    bits_before=4.5,
    bits_after=4.5,
    weight_norm=4.0,
    delta_norm=2.0,
    error_norm=1.0,
    delta_retained=0.75,
    output_retained=0.5,
)
MODEL = MergeReport(strategy="auto", layers=(LAYER,))


@pytest.mark.parametrize(
    ("report", "old", "new"),
    [
        (LAYER, "change_norm", "delta_norm"),
        (LAYER, "change_kept", "delta_retained"),
        (LAYER, "output_kept", "output_retained"),
        (LAYER, "is_aware", "is_merge_aware"),
        (MODEL, "change_kept", "delta_retained"),
        (MODEL, "output_kept", "output_retained"),
        (MODEL, "error_to_change", "error_to_delta"),
    ],
)
def test_an_old_name_of_a_field_warns_and_gives_the_new_field(report, old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        assert getattr(report, old) == getattr(report, new)


def test_the_strategy_of_a_layer_is_in_its_report():
    with pytest.warns(DeprecationWarning, match=r"done\(layer\) is now layer.strategy"):
        assert MODEL.done(LAYER) == "requantize"


@pytest.mark.parametrize("report", [LAYER, MODEL])
def test_other_names_are_no_attributes(report):
    for name in ("change", "", "error_to_change" if report is LAYER else "is_aware"):
        with pytest.raises(AttributeError, match="has no attribute"):
            getattr(report, name)


@pytest.mark.parametrize("report", [LAYER, MODEL])
def test_a_report_copies_and_pickles(report):
    assert copy.deepcopy(report) == report
    assert pickle.loads(pickle.dumps(report)) == report
