"""The JSON of a checkpoint, and the check of one quantized weight."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_quantlayers.formats.checkpoint import FORMAT_VERSION, specs_from_json, specs_to_json
from peft_quantlayers.formats.quant_spec import suggest_divisor
from peft_quantlayers.methods import HQQMethod, HQQSpec, spec_from_dict

specs = st.builds(HQQSpec, nbits=st.sampled_from([2, 3, 4, 8]), group_size=st.sampled_from([None, 32, 64]))
names = st.text("abc.0123_", min_size=1, max_size=12)


@settings(max_examples=50, deadline=None)
@given(modules=st.dictionaries(names, specs, min_size=1, max_size=8))
def test_modules_and_specs_survive_json(modules):
    fields = json.loads(json.dumps(specs_to_json(modules)))
    assert specs_from_json(fields, spec_from_dict) == modules


def test_each_distinct_spec_is_written_once():
    fields = specs_to_json({"a": HQQSpec(), "b": HQQSpec(nbits=3), "c": HQQSpec()})
    assert len(fields["specs"]) == 2
    assert fields["modules"] == {"a": 0, "b": 1, "c": 0}
    assert fields["format_version"] == 1  # the oldest that says everything


def stored(**changes):
    return specs_to_json({"a": HQQSpec()}) | changes


@pytest.mark.parametrize(
    ("fields", "error", "text"),
    [
        (None, TypeError, "must be a mapping"),
        (stored(quant_method="hqq"), ValueError, "quant_method='hqq'"),
        (stored(format_version=None), ValueError, "format_version=None"),
        (stored(format_version=True), ValueError, "format_version=True"),
        (stored(format_version=0), ValueError, "format_version=0"),
        (stored(format_version=FORMAT_VERSION + 1), ValueError, "newer.*pip install -U"),
        (stored(surprise=1), ValueError, "surprise"),
        (stored(specs={}), TypeError, "specs"),
        (stored(modules={}), TypeError, "modules"),
        (stored(modules={"a": 1}), ValueError, r"modules\['a'\]=1"),
        (stored(modules={"a": -1}), ValueError, r"modules\['a'\]=-1"),
        (stored(modules={"a": True}), ValueError, r"modules\['a'\]=True"),
        (stored(specs=[{"method": "hqq", "nbits": 7}]), ValueError, r"specs\[0\]: nbits=7"),
        (stored(specs=[{"method": "hqq", "surprise": 7}]), ValueError, r"specs\[0\]: unknown field.*surprise"),
        (stored(specs=["hqq"]), TypeError, r"specs\[0\]"),
    ],
)
def test_json_that_makes_no_sense_is_refused(fields, error, text):
    with pytest.raises(error, match=text):
        specs_from_json(fields, spec_from_dict)


def quantized_weight(**changes):
    quantized = HQQMethod().quantize(torch.randn(8, 64), HQQSpec(group_size=32))
    return dataclasses.replace(quantized, tensors=quantized.tensors | changes)


def test_a_weight_as_the_quantizer_made_it_passes_the_check():
    quantized_weight().check("layer")


def test_a_row_whose_scales_are_zero_among_others_passes_the_check():
    scale = quantized_weight().tensors["scale"].clone()
    scale[3] = 0
    quantized_weight(scale=scale).check("layer")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"surprise": torch.zeros(1)}, "layer: expected the tensors"),
        ({"W_q": torch.zeros(8, 31, dtype=torch.uint8)}, r"layer\.W_q: expected torch\.uint8 of shape \(8, 32\)"),
        ({"W_q": torch.zeros(8, 32, dtype=torch.int8)}, r"layer\.W_q: expected torch\.uint8"),
        ({"scale": torch.zeros(8, 2)}, r"layer\.scale: expected torch\.float16"),
        ({"zero": torch.zeros(2, 8, dtype=torch.float16)}, r"layer\.zero: expected"),
        ({"zero": torch.full((8, 2), torch.nan, dtype=torch.float16)}, r"layer\.zero holds NaN"),
        ({"scale": torch.zeros(8, 2, dtype=torch.float16)}, r"layer\.scale holds nothing but zeros.*[Dd]ownload"),
        ({"scale": torch.full((8, 2), torch.inf, dtype=torch.float16)}, r"layer\.scale holds NaN or Inf"),
    ],
)
def test_a_damaged_weight_is_refused_by_tensor(changes, text):
    with pytest.raises(ValueError, match=text):
        quantized_weight(**changes).check("layer")


def test_a_missing_tensor_is_refused():
    quantized = quantized_weight()
    tensors = {name: tensor for name, tensor in quantized.tensors.items() if name != "zero"}
    with pytest.raises(ValueError, match="expected the tensors"):
        dataclasses.replace(quantized, tensors=tensors).check("layer")


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 5000), near=st.integers(1, 6000))
def test_the_suggested_divisor_divides_and_none_is_nearer(size, near):
    suggestion = suggest_divisor(size, near)
    assert size % suggestion == 0
    distance = abs(suggestion - near)
    for nearer in range(max(1, near - distance + 1), near + distance):
        assert size % nearer
