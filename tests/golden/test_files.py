"""Files that version 0.1.0 wrote before its packages were rebuilt: they load, compute the same, and are written again.

``make.py`` says how they were made and with which commit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import peft_quantlayers as pql
from peft_quantlayers.formats.checksums import METADATA_KEY

from . import models
from .files import ADAPTERS, MODELS, PUBLISHED, assert_written, digests, quantization_config, tensors_of
from .models import FILES, IDS

# Of a forward pass, in the norm: what sums in another order may give. In bfloat16 a rounding more or less.
TOLERANCE = dict.fromkeys((*MODELS, *PUBLISHED, *ADAPTERS, "resume"), 1e-6) | {"compute_dtype": 1e-2}
LOGITS = tensors_of(FILES / "logits.safetensors")


def assert_same_logits(found: Tensor, name: str) -> None:
    error = (found - LOGITS[name]).norm() / LOGITS[name].norm()
    assert error <= TOLERANCE[name], float(error)


def test_all_files_are_small():
    assert sum(file.stat().st_size for file in FILES.rglob("*") if file.is_file()) < 2**20


@pytest.mark.parametrize("name", [*MODELS, *PUBLISHED])
def test_a_model_computes_the_same_logits(name: str):
    assert_same_logits(models.logits_of(models.load(name)), name)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_again_as_it_was(name: str, tmp_path: Path):
    models.load(name).save_pretrained(tmp_path)
    assert_written(tmp_path, quantization_config(FILES / name), digests(FILES / name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_written_in_our_format_with_the_same_tensors(name: str, tmp_path: Path):
    expected = json.loads((FILES / "saved_again.json").read_text())[name]
    models.load(name).save_pretrained(tmp_path)
    assert_written(tmp_path, expected["config"], expected["tensors"])


def test_the_formats_are_those_that_their_names_say():
    said = {name: quantization_config(FILES / name) for name in (*MODELS, "published_hqq")}
    versions = {name: config.get("format_version") for name, config in said.items()}
    assert versions == dict.fromkeys(MODELS, 1) | {"branches": 2, "aqlm": None, "published_hqq": None}
    assert said["aqlm"]["quant_method"] == "aqlm"
    assert said["published_hqq"]["quant_method"] == "hqq"
    assert said["compute_dtype"]["compute_dtype"] == "float32"
    assert {spec["method"] for spec in said["hqq_aqlm"]["specs"]} == {"hqq", "aqlm"}
    assert {spec["nbits"] for spec in said["hqq_mixed"]["specs"]} == {1, 2, 3, 5, 6, 8}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_computes_the_same_logits(adapter: str):
    peft_model = models.load_adapter(ADAPTERS[adapter], adapter)
    assert_same_logits(models.logits_of(peft_model), adapter)
    assert (LOGITS[adapter] - LOGITS[ADAPTERS[adapter]]).norm() > 0.01 * LOGITS[adapter].norm()


def adapter_config(folder: Path) -> dict[str, Any]:
    """Without what depends on where and with which PEFT it was written; sets in order."""
    fields = json.loads((folder / "adapter_config.json").read_text())
    for name in ("peft_version", "base_model_name_or_path"):
        fields.pop(name)
    return {name: sorted(value) if isinstance(value, list) else value for name, value in fields.items()}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_is_written_again_as_it_was(adapter: str, tmp_path: Path):
    models.load_adapter(ADAPTERS[adapter], adapter).save_pretrained(tmp_path)
    assert adapter_config(tmp_path) == adapter_config(FILES / adapter)
    assert digests(tmp_path) == digests(FILES / adapter)


def test_the_merge_aware_adapter_says_what_it_was_rounded_against():
    fields = adapter_config(FILES / "merge_aware")
    assert sorted(fields["merge_aware"]["layers"]) == sorted(pql.quantized_modules(models.load("hqq")))
    assert "merge_aware" not in adapter_config(FILES / "lora")


def test_blocks_in_a_resume_folder_are_taken_from_there(tmp_path: Path):
    shutil.copytree(FILES / "resume", tmp_path / "resume")
    done: list[pql.LayerResult] = []
    model = models.calibrated(tmp_path / "resume", done.append)
    assert not done
    assert_same_logits(models.logits_of(model), "resume")
    for index, block in enumerate(model.model.layers):
        stored = tensors_of(FILES / "resume" / f"model.layers.{index}.safetensors")
        assert stored.keys() == block.state_dict().keys()
        assert all(torch.equal(tensor, stored[name]) for name, tensor in block.state_dict().items())


def test_a_resume_folder_is_written_again_in_the_same_form(tmp_path: Path):
    """Its fingerprint too: it says that a run of today may go on where one of that version stopped."""
    models.calibrated(tmp_path)
    written, golden = sorted(tmp_path.iterdir()), sorted((FILES / "resume").iterdir())
    assert [file.name for file in written] == [file.name for file in golden]
    for mine, theirs in zip(written, golden, strict=True):
        assert header_of(mine) == header_of(theirs)


def header_of(file: Path) -> dict[str, Any]:
    """Metadata, and name, dtype, shape and place of each tensor; without the checksums of later versions."""
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header["__metadata__"].pop(METADATA_KEY, None)
    return header


def test_the_ids_are_those_of_the_files():
    assert LOGITS["hqq"].shape == (*IDS.shape, models.VOCABULARY)
