"""Adapters whose files are damaged are refused by the name of the layer and the tensor, or of the file."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from golden import models
from golden.files import tensors_of
from golden.models import FILES
from peft import PeftModel
from safetensors.torch import save_file

ADAPTERS = ("lora", "merge_aware", "quant_scales", "qalora")


@pytest.fixture(params=ADAPTERS)
def folder(request, tmp_path):
    return Path(shutil.copytree(FILES / request.param, tmp_path / request.param))


@pytest.mark.parametrize("damage", ["int32", "bool", "NaN", "Inf"])
def test_a_tensor_of_integers_or_with_nan_is_refused_by_name(damage, folder):
    file = folder / "adapter_model.safetensors"
    tensors = tensors_of(file)
    name = sorted(tensors)[len(tensors) // 2]
    if damage in ("int32", "bool"):
        tensors[name] = tensors[name].to(getattr(torch, damage))
    else:
        tensors[name].view(-1)[-1] = float(damage)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors: .* (holds torch|holds NaN or Inf)"):
        PeftModel.from_pretrained(models.load("hqq"), folder)


@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_not_opened(what, folder):
    file = folder / "adapter_model.safetensors"
    file.unlink()
    if what == "pipe":
        os.mkfifo(file)
    elif what == "device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no regular file"):
        PeftModel.from_pretrained(models.load("hqq"), folder)


@pytest.mark.parametrize("value", [True, [1], {"layer": "x"}, "text"])
def test_checksums_of_the_base_that_are_none_are_refused(value, tmp_path):
    folder = Path(shutil.copytree(FILES / "quant_scales", tmp_path / "adapter"))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_crc32": value}))
    with pytest.raises(TypeError, match=r"base_crc32=.*damaged"):
        PeftModel.from_pretrained(models.load("hqq"), folder)
