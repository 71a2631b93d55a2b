"""The config of scale-only finetuning, as PEFT reads and writes it. No layers, no models."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig

from ..formats.quant_spec import METADATA_ROLES
from ..lora.adapter_folder import refuse_special_files

BIASES, NORMS = "biases", "norms"
TRAINABLE = (*METADATA_ROLES, BIASES, NORMS)


class QuantScalesType(str, enum.Enum):  # noqa: UP042 (PEFT's status reads the name from str() of such a class)
    """The ``peft_type`` in ``adapter_config.json``. PEFT's own enum is closed; its tables take any string enum."""

    QUANT_SCALES = "QUANT_SCALES"


@dataclass
class QuantScalesConfig(PeftConfig):
    """Scale-only finetuning: trains floating tensors of quantized layers; the codes are fixed.

    For ``get_peft_model``. The trained copies are float32, whatever dtype the base stores. ``merge_and_unload`` loses
    nothing: it widens the scales, zeros and codebooks of the layers that it changes to float32 (the spec's
    ``scale_dtype`` then says so), and biases and norms are trained as rounded to the dtype that the model stores.

    Source: Kim et al. 2023, "Memory-Efficient Fine-Tuning of Compressed Large Language Models via sub-4-bit Integer
    Quantization" (PEQA), for scales; the other tensors are an extension.

    Fields:
        target_modules: quantized layers, as in LoraConfig: a list of name endings, a regular expression, or
            "all-linear" for all of them. Norms are not named here.
        train: what is trained: "scales", "zeros" (HQQ), "codebooks" (AQLM), "biases" of the targeted layers, and
            "norms": weights and biases of all norm layers that ``exclude_modules`` and ``layers_to_transform`` allow.
        exclude_modules: name endings or a regular expression of modules to leave out.
        modules_to_save: dense modules to train in full and to save with the adapter.
        layers_to_transform: indices of the blocks to train in; None for all.
        layers_pattern: name of the list that these indices count, if it is not the first one.
        base_crc32: written by saving: checksum of the quantized tensors of each trained layer. Scales are valid for
            their codes, zeros and codebooks only, so an adapter refuses a base where any of these differ.
    """

    target_modules: list[str] | set[str] | str | None = "all-linear"
    train: tuple[str, ...] = ("scales",)
    exclude_modules: list[str] | set[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    base_crc32: dict[str, int] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = QuantScalesType.QUANT_SCALES
        if isinstance(self.train, str) or not all(isinstance(name, str) for name in self.train):
            raise TypeError(f"train must be a tuple of names, got {self.train!r}; for example train=('scales',).")
        self.train = tuple(dict.fromkeys(self.train))
        unknown = [name for name in self.train if name not in TRAINABLE]
        if unknown or not self.train:
            said = f"{unknown} cannot be trained" if unknown else "nothing to train"
            raise ValueError(f"train={self.train!r}: {said}; choose from {TRAINABLE}.")
        checksums = {} if self.base_crc32 is None else self.base_crc32
        if not isinstance(checksums, dict) or not all(isinstance(value, int) for value in checksums.values()):
            raise TypeError(
                f"base_crc32={str(checksums)[:60]} is not a mapping of layers to checksums: the file is damaged. "
                "Download or save the adapter again."
            )
        is_pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if is_pattern and self.layers_to_transform is not None:
            raise ValueError(
                f"layers_to_transform cannot be combined with the regular expression target_modules="
                f"{self.target_modules!r}. Name the layers in the expression, or list the names of modules."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)
        # The tensors to train in each module, by module name; filled for a model when the config is applied to it.
        self.plan: dict[str, tuple[str, ...]] = {}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's, which is about to load the weights beside the config: they must be a regular file."""
        refuse_special_files(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
