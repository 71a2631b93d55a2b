"""Writes the golden files. Run it with the code of an older commit, never with the code that they are to test:

    cd tests && PYTHONPATH=OLD:OLD/kernels python -m golden.make COMMIT

where OLD is a checkout of COMMIT with the compiled kernels built. The files here are of fe950d7, the last commit
before the packages were rebuilt (its folders were quantizers/ and adapters/). Needs the ``hqq`` package.
"""

import json
import shutil
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import torch
from hqq.core.quantize import BaseQuantizeConfig
from hqq.models.hf.base import AutoHQQHFModel
from safetensors.torch import save_file
from torch import nn

import peft_quantlayers as pql
from peft_quantlayers import HQQConfig

from . import bits, models
from .files import ADAPTERS, MODELS, PUBLISHED, digests, quantization_config
from .models import FILES, llama, logits_of, quantized

sys.path.append(str(Path(__file__).parents[1] / "interop"))
from hqq_models import save_like_the_package, save_like_transformers_4


def save(model: nn.Module, name: str) -> None:
    """config.json and safetensors alone."""
    model.save_pretrained(FILES / name)
    for extra in ("generation_config.json", "README.md"):
        (FILES / name / extra).unlink(missing_ok=True)


def save_adapter(peft_model: nn.Module, name: str) -> None:
    """adapter_config.json and safetensors, without the name of the folder that the base came from."""
    for config in peft_model.peft_config.values():
        config.base_model_name_or_path = ""
    peft_model.save_pretrained(FILES / name)
    (FILES / name / "README.md").unlink()


def by_the_hqq_package(nbits: float, *, group_size: int, axis: int) -> nn.Module:
    """Our Llama quantized by the ``hqq`` package."""
    model = llama()
    settings = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=axis)
    with patch("hqq.models.base.cleanup"):
        AutoHQQHFModel.quantize_model(model, settings, compute_dtype=torch.float32, device="cpu")
    return model


def write_models() -> None:
    """One folder for each format of a model."""
    save(llama(n_blocks=2), "float")
    save(quantized(llama(n_blocks=2), HQQConfig(nbits=4, group_size=32)), "hqq")
    save(quantized(llama(n_blocks=2), models.MIXED), "hqq_mixed")
    save(models.with_both_methods(), "hqq_aqlm")
    save(models.with_branches(), "branches")
    save(quantized(llama(n_blocks=2), models.AQLM), "aqlm")
    save(quantized(models.gpt2(), HQQConfig(nbits=4, group_size=32)), "conv1d")
    with tempfile.TemporaryDirectory() as folder:
        save(models.in_float32_on_bfloat16(Path(folder)), "compute_dtype")
    save_like_transformers_4(by_the_hqq_package(4, group_size=32, axis=1), FILES / "published_hqq")
    save_like_the_package(by_the_hqq_package(3, group_size=16, axis=0), FILES / "hqq_package_folder")


def write_adapters() -> None:
    """One folder for each kind of adapter."""
    save_adapter(models.with_lora(models.load("hqq")), "lora")
    aware = models.with_lora(models.load("hqq"))
    pql.enable_merge_aware(aware)
    save_adapter(aware, "merge_aware")
    save_adapter(models.with_scales(models.load("hqq")), "quant_scales")
    save_adapter(models.with_lora(models.load("hqq"), use_qalora=True, qalora_group_size=32), "qalora")


def write_expected() -> None:
    """Logits of all; and what a published checkpoint is when it is saved again, in our own format."""
    logits, saved_again = {}, {}
    for name in (*MODELS, *PUBLISHED):
        model = models.load(name)
        logits[name] = logits_of(model)
        if name in PUBLISHED:
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                saved_again[name] = {"config": quantization_config(folder), "tensors": digests(folder)}
    for adapter, base in ADAPTERS.items():
        logits[adapter] = logits_of(models.load_adapter(base, adapter))
    logits["resume"] = logits_of(models.calibrated(FILES / "resume"))
    save_file(logits, FILES / "logits.safetensors")
    (FILES / "saved_again.json").write_text(json.dumps(saved_again, indent=1, sort_keys=True) + "\n")


def main(commit: str) -> None:
    torch.set_num_threads(1)
    shutil.rmtree(FILES, ignore_errors=True)
    FILES.mkdir()
    write_models()
    write_adapters()
    models.calibrated(FILES / "resume")
    write_expected()
    made = {f"{item}/{name}": tensor for item, make in bits.recipes().items() for name, tensor in make().items()}
    save_file(made, FILES / "bits.safetensors")
    packages = ("transformers", "peft", "safetensors", "hqq")
    written_by = {"commit": commit} | {name: version(name) for name in packages} | bits.machine()
    (FILES / "written_by.json").write_text(json.dumps(written_by, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
