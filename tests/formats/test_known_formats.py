"""Which format a model is written in, what each writes, and that its reader gives the description back."""

import dataclasses
import json
import re

import pytest
import torch

from peft_quantlayers.formats.checkpoint_format import ModelDescription, TensorHeader
from peft_quantlayers.formats.known_formats import choose_format, known_formats
from peft_quantlayers.methods import AQLMSpec, HQQSpec, spec_from_dict

SPEC = AQLMSpec(num_codebooks=2, nbits_per_codebook=8)
AQLM = ModelDescription(specs={"a": SPEC, "b.c": SPEC}, dense_linears=("lm_head",))
HQQ = ModelDescription(specs={"a": HQQSpec(), "b": HQQSpec(nbits=3)}, dense_linears=("lm_head",))


class Headers:
    """A checkpoint of headers alone."""

    def __init__(self, headers: dict[str, TensorHeader]) -> None:
        self.headers = headers

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError(f"{name} is not needed")


def aqlm_headers(description: ModelDescription) -> Headers:
    return Headers(
        {
            f"{name}.{part}": TensorHeader(shape=entry.shape, dtype=entry.dtype)
            for name, spec in description.specs.items()
            for part, entry in spec.tensor_layout(64, 64).items()
        }
    )


def test_the_names_of_the_formats_are_their_quant_methods():
    assert list(known_formats()) == ["aqlm", "hqq", "quantlayers"]


@pytest.mark.parametrize(
    ("description", "name", "reason"),
    [
        (AQLM, "aqlm", None),
        (dataclasses.replace(AQLM, compute_dtype="float32"), "quantlayers", "compute_dtype='float32'"),
        (dataclasses.replace(AQLM, branches={"b.c": 4}), "quantlayers", r"no low-rank branches, and b\.c has one"),
        (dataclasses.replace(AQLM, lossy_in_model_dtype=("b.c",)), "quantlayers", r"cannot hold those of b\.c"),
        (
            dataclasses.replace(AQLM, specs={"a": SPEC, "b": dataclasses.replace(SPEC, num_codebooks=1)}),
            "quantlayers",
            "one scheme for all layers",
        ),
        (
            dataclasses.replace(AQLM, specs={"a": SPEC, "b": dataclasses.replace(SPEC, scale_dtype="float32")}),
            "aqlm",
            None,
        ),
        (dataclasses.replace(AQLM, specs={"a": SPEC, "b": HQQSpec()}), "quantlayers", r"not \['hqq'\]"),
        (HQQ, "quantlayers", r"not \['hqq'\]"),
    ],
)
def test_the_published_aqlm_format_is_chosen_where_it_holds_the_whole_model(description, name, reason):
    assert choose_format(description).name == name
    found = known_formats()["aqlm"].can_hold(description)
    assert found is None if reason is None else re.search(reason, found)


def test_our_own_format_holds_every_model_and_the_published_hqq_format_is_never_written():
    for description in (AQLM, HQQ):
        assert known_formats()["quantlayers"].can_hold(description) is None
        assert "not written" in known_formats()["hqq"].can_hold(description)
    with pytest.raises(NotImplementedError, match="read and not written"):
        known_formats()["hqq"].write(HQQ)


def test_the_published_aqlm_format_writes_its_scheme_and_both_spellings_of_dense_layers():
    assert known_formats()["aqlm"].write(AQLM) == {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": ["lm_head", "lm_head.weight"],
    }


def test_the_published_aqlm_format_reads_specs_from_the_headers():
    specs = {"a": SPEC, "b.c": dataclasses.replace(SPEC, scale_dtype="float32")}
    written = json.loads(json.dumps(known_formats()["aqlm"].write(AQLM)))
    headers = aqlm_headers(dataclasses.replace(AQLM, specs=specs))
    read = known_formats()["aqlm"].read(written, headers, spec_from_dict=spec_from_dict)
    assert read == ModelDescription(specs=specs)


@pytest.mark.parametrize(
    "description",
    [
        HQQ,
        dataclasses.replace(HQQ, compute_dtype="bfloat16"),
        dataclasses.replace(HQQ, branches={"b": 4}),
        dataclasses.replace(AQLM, compute_dtype="float16", branches={"a": 2, "b.c": 7}),
    ],
)
def test_our_own_format_reads_what_it_writes(description):
    written = json.loads(json.dumps(known_formats()["quantlayers"].write(description)))
    read = known_formats()["quantlayers"].read(written, Headers({}), spec_from_dict=spec_from_dict)
    assert read == dataclasses.replace(description, dense_linears=())


def test_a_compute_dtype_that_does_not_exist_is_refused():
    fields = known_formats()["quantlayers"].write(HQQ) | {"compute_dtype": "float8"}
    with pytest.raises(ValueError, match="compute_dtype='float8'"):
        known_formats()["quantlayers"].read(fields, Headers({}), spec_from_dict=spec_from_dict)


def test_a_model_that_no_format_holds_is_refused_with_all_reasons(monkeypatch):
    formats = tuple(known_formats().values())
    monkeypatch.setattr("peft_quantlayers.formats.known_formats._FORMATS", formats[:2])
    with pytest.raises(ValueError, match=r"(?s)no checkpoint format.*aqlm: it holds.*hqq: this format is read"):
        choose_format(HQQ)
