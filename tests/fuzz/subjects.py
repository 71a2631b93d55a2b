"""The folders that are damaged, and how each is loaded."""

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from golden import models
from golden.models import FILES
from peft import PeftModel
from transformers import AutoModelForCausalLM

import peft_quantlayers as pql

SHARD_SIZE = "8KB"


@dataclass(frozen=True)
class Subject:
    """A folder with a model or an adapter.

    Fields:
        name: of the folder.
        has_checksums: whether other values in it must be noticed.
        base: name of the golden model that an adapter lies on; None for a model.
    """

    name: str
    has_checksums: bool
    base: str | None = None

    @property
    def config(self) -> str:
        """The name of its JSON."""
        return "adapter_config.json" if self.base else "config.json"

    def load(self, folder: Path) -> torch.nn.Module:
        """As users do it."""
        if self.base:
            return PeftModel.from_pretrained(models.load(self.base), folder).eval()
        if self.name == "hqq_package_folder":
            return pql.load_hqq_folder(folder)
        return AutoModelForCausalLM.from_pretrained(folder)


def digest_of(model: torch.nn.Module) -> str:
    """Of a model's logits, to the bit."""
    return hashlib.sha256(models.logits_of(model).numpy().tobytes()).hexdigest()


WRITTEN = ("hqq", "hqq_mixed", "aqlm", "branches", "conv1d", "compute_dtype")
SUBJECTS = (
    *(Subject(name, has_checksums=True) for name in WRITTEN),
    Subject("sharded", has_checksums=True),
    Subject("published_hqq", has_checksums=False),
    Subject("hqq_package_folder", has_checksums=True),  # those of a zip file
    Subject("lora", has_checksums=True, base="hqq"),
    Subject("quant_scales", has_checksums=True, base="hqq"),
)


def write_subjects(folder: Path) -> None:
    """The folders of all subjects as this version writes them; published ones as they were published."""
    for subject in SUBJECTS:
        if subject.name in WRITTEN:
            models.load(subject.name).save_pretrained(folder / subject.name)
        elif subject.name == "sharded":
            models.load("hqq_mixed").save_pretrained(folder / subject.name, max_shard_size=SHARD_SIZE)
        elif subject.base:
            subject.load(FILES / subject.name).save_pretrained(folder / subject.name)
        else:
            shutil.copytree(FILES / subject.name, folder / subject.name)
    # Of the same architecture, for shards of another save.
    other = models.load("hqq_mixed")
    other.model.embed_tokens.weight.data.mul_(0.5)
    other.save_pretrained(folder / "another", max_shard_size=SHARD_SIZE)
    assert len(list((folder / "another").glob("*.safetensors"))) > 2
