"""What ``HQQConfig.for_export`` says that a format holds exactly, ``export`` writes exactly."""

import pytest

import peft_quantlayers as pql
from peft_quantlayers.exports.formats.converted import ConvertedFormat
from peft_quantlayers.exports.formats.grid_format import GridFormat
from peft_quantlayers.methods.hqq.export_grids import TARGETS, held_nbits

from .models import quantized

# Those of converters are slow; test_gguf.py and test_graphs.py have their widths.
FORMATS = [
    name
    for name, each in pql.export_formats().items()
    if isinstance(each, GridFormat) and not isinstance(each, ConvertedFormat)
]


@pytest.mark.parametrize(
    ("format", "nbits"), [(name, nbits) for name in FORMATS for nbits in held_nbits(name)], ids=str
)
def test_a_model_that_was_quantized_for_a_format_is_exported_exactly(format, nbits, tmp_path):
    config = pql.HQQConfig.for_export(format, nbits=nbits, group_size=32)
    report = pql.export(quantized(config=config), tmp_path / "out", format)
    assert report.is_exact


def test_every_format_of_grids_is_a_target():
    assert {name for name, each in pql.export_formats().items() if isinstance(each, GridFormat)} <= set(TARGETS)
    assert len(FORMATS) > 3
