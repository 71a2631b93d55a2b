"""Files in each format that came after version 0.1.0: they load, compute the same, and are written again as they were.

``later_formats.py`` says how they were made and with which commit.
"""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.checkpoint import FORMAT_VERSION

from .files import digests, quantization_config, tensors_of
from .later_formats import FILES, MODELS
from .models import logits_of

LOGITS = tensors_of(FILES / "logits.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_logits(name: str):
    error = (logits_of(AutoModelForCausalLM.from_pretrained(FILES / name)) - LOGITS[name]).norm()
    assert error <= 1e-6 * LOGITS[name].norm()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_again_as_it_was(name: str, tmp_path: Path):
    pql.save_model(AutoModelForCausalLM.from_pretrained(FILES / name), tmp_path / "again")
    assert quantization_config(tmp_path / "again") == quantization_config(FILES / name)
    assert digests(tmp_path / "again") == digests(FILES / name)


def test_every_version_of_the_format_has_a_file():
    """From the fifth on: the first four are among the files of version 0.1.0, and of what it writes today."""
    found = {name: quantization_config(FILES / name)["format_version"] for name in MODELS}
    assert found == {name: version for name, (version, _) in MODELS.items()}
    assert set(found.values()) == set(range(5, FORMAT_VERSION + 1))


def test_all_files_are_small():
    assert sum(file.stat().st_size for file in FILES.rglob("*") if file.is_file()) < 2**20
