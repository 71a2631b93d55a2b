"""Files in each format and method that came after version 0.1.0: they load with the same weights to the bit, compute
the same, and are written again as they were.

``later_formats.py`` says how they were made and with which commit.
"""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql
from peft_quantlayers.formats.checkpoint import FORMAT_VERSION
from peft_quantlayers.methods import registered_methods

from .files import assert_written, digests, quantization_config, tensors_of
from .later_formats import FILES, MODELS, SUMMED, dequantized_digests
from .models import FILES as FIRST_FILES
from .models import logits_of

DEQUANTIZED = json.loads((FILES / "dequantized.json").read_text())
# Of a forward pass, in the norm: what sums in another order may give. In bfloat16 a rounding more or less.
TOLERANCE = dict.fromkeys(MODELS, 1e-6) | {"compute_dtypes": 1e-2} | dict.fromkeys(SUMMED, 1e-5)
LOGITS = tensors_of(FILES / "logits.safetensors")


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_the_same_logits(name: str):
    error = (logits_of(AutoModelForCausalLM.from_pretrained(FILES / name)) - LOGITS[name]).norm()
    assert error <= TOLERANCE[name] * LOGITS[name].norm()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SUMMED])
def test_its_weights_are_those_that_the_older_code_read_from_it(name: str):
    found = dequantized_digests(AutoModelForCausalLM.from_pretrained(FILES / name))
    assert found
    assert found == DEQUANTIZED[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_again_as_it_was(name: str, tmp_path: Path):
    pql.save_model(AutoModelForCausalLM.from_pretrained(FILES / name), tmp_path / "again")
    assert_written(tmp_path / "again", quantization_config(FILES / name), digests(FILES / name))


def test_every_version_of_the_format_has_a_file():
    """From the third on: the first two are among the files of version 0.1.0."""
    found = {name: quantization_config(FILES / name)["format_version"] for name in MODELS}
    assert found == {name: version for name, (version, _) in MODELS.items()}
    assert set(found.values()) >= set(range(3, FORMAT_VERSION + 1))


def test_every_method_has_a_file():
    folders = [
        folder for files in (FILES, FIRST_FILES) for folder in files.iterdir() if (folder / "config.json").exists()
    ]
    configs = [json.loads((folder / "config.json").read_text()).get("quantization_config", {}) for folder in folders]
    assert {spec["method"] for config in configs for spec in config.get("specs", ())} == set(registered_methods())


def test_all_files_are_small():
    assert sum(file.stat().st_size for file in FILES.rglob("*") if file.is_file()) < 2**20
