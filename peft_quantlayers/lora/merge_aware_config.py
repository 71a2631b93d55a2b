"""The saved config of a merge-aware adapter: which quantized weights it was rounded against.

The config's class has two fields more than PEFT's. PEFT alone ignores ``merge_aware`` with a warning. May import
formats, layers and PEFT's public classes.
"""

from __future__ import annotations

import copy
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..formats import QuantizedWeight
from ..formats.quantized_weight import weight_checksum
from ..layers import QuantizedLinear
from .adapter_folder import refuse_special_files

# Version of the rounding: an adapter has its training loss only with the rounding that it was trained through.
ROUNDING_VERSION = 2

# Beside adapter_config.json: which quantized layers the adapter was trained on.
BASE_FILE = "quantlayers_base.json"

WAY_OUT = (
    'Load it on the base it was trained on, or merge it with strategy="requantize" after deleting "merge_aware" from '
    "its adapter_config.json."
)


@dataclass
class MergeAwareLoraConfig(LoraConfig):
    """The ``LoraConfig`` of an adapter on quantized layers: it records which. Fields that are None are not saved.

    Attributes:
        merge_aware: ``{"rounding": version, "layers": {name: fingerprint of the quantized weight}}`` of an adapter
            that was trained through the rounding of the merge; None for an ordinary one.
        quantized_base: ``{"layers": {name: fingerprint of a sample of the quantized weight}}``, the layers that the
            adapter lies on, and under "transforms" what was done to the base before it was quantized, if anything;
            see :mod:`.base_fingerprint`.
    """

    merge_aware: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the adapter was rounded against while it was trained."}
    )
    quantized_base: dict[str, Any] | None = field(
        default=None, metadata={"help": "The quantized layers that the adapter was trained on."}
    )

    @staticmethod
    def of(config: LoraConfig) -> MergeAwareLoraConfig:
        """A copy of ``config`` that has the fields of this class too."""
        aware = MergeAwareLoraConfig.__new__(MergeAwareLoraConfig)
        vars(aware).update(copy.copy(vars(config)))
        return aware

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; an adapter on float layers is saved as if this class did not exist."""
        fields = super().to_dict()
        fields.pop("quantized_base", None)
        if self.merge_aware is None:
            fields.pop("merge_aware", None)
        return fields

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; ``quantized_base`` gets a file of its own, since PEFT warns of fields that it does not know."""
        super().save_pretrained(save_directory, **kwargs)
        file = Path(save_directory, BASE_FILE)
        if self.quantized_base is not None:
            file.write_text(json.dumps(self.quantized_base, indent=2) + "\n")
        else:
            file.unlink(missing_ok=True)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> LoraConfig:
        """As PEFT's, with ``quantized_base`` where the adapter is in a folder.

        PEFT is about to load the weights beside the config: they must be a regular file.
        """
        refuse_special_files(pretrained_model_name_or_path, subfolder)
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, MergeAwareLoraConfig):
            config.quantized_base = base_record(pretrained_model_name_or_path, subfolder)
        return config


def base_record(folder: Any, subfolder: str | None = None) -> dict[str, Any] | None:
    """What ``folder`` says of the base of the adapter in it; None where it says nothing, or is no folder here."""
    file = Path(folder, subfolder or "", BASE_FILE)
    try:
        return json.loads(file.read_text()) if file.is_file() else None
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged ({error}). Delete it to load the adapter without a comparison of the bases."
        ) from None


def fingerprint(weight: QuantizedWeight) -> str:
    """A checksum of the spec and all tensors of ``weight``: equal for the same codes on the same grid only."""
    spec = zlib.crc32(json.dumps(weight.spec.to_dict(), sort_keys=True).encode())
    return f"{weight_checksum(weight, start=spec):08x}"


def with_fingerprints(config: LoraConfig, layers: dict[str, str]) -> MergeAwareLoraConfig:
    """A copy of ``config`` that records what its adapter is rounded against: name and fingerprint of each layer."""
    aware = MergeAwareLoraConfig.of(config)
    aware.merge_aware = {"rounding": ROUNDING_VERSION, "layers": layers}
    return aware


def fingerprints_of(config: Any) -> dict[str, Any] | None:
    """What :func:`with_fingerprints` wrote into ``config``, or None."""
    return getattr(config, "merge_aware", None)


def check_rounded_layers(config: Any, model: nn.Module) -> None:
    """Raise ValueError if the adapter was trained through the rounding of a layer that ``model`` has dense."""
    recorded = fingerprints_of(config)
    if recorded is None:
        return
    if not isinstance(recorded, dict) or not isinstance(recorded.get("layers"), dict):
        raise ValueError(f"the adapter's config holds a damaged merge_aware={recorded!r}. {WAY_OUT}")
    modules = dict(model.named_modules())
    for name in recorded["layers"]:
        layer: Any = modules.get(name)
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
        if layer is not None and not isinstance(base, QuantizedLinear):
            raise ValueError(
                f"{name}: the adapter was trained through the rounding of this layer's quantized weight, and here it "
                f"is a {type(base).__name__}, on which the adapter computes something else. {WAY_OUT}"
            )


def check_fingerprint(recorded: dict[str, Any], layer_name: str, weight: QuantizedWeight, *, adapter: str) -> None:
    """Raise ValueError unless the adapter was trained through the rounding of this very weight."""
    if recorded.get("rounding") != ROUNDING_VERSION:
        raise ValueError(
            f"adapter {adapter!r} was trained through version {recorded.get('rounding')!r} of the rounding, and this "
            f"is version {ROUNDING_VERSION}: install the peft_quantlayers that it was trained with. {WAY_OUT}"
        )
    if recorded["layers"].get(layer_name) != fingerprint(weight):
        raise ValueError(
            f"{layer_name}: adapter {adapter!r} was trained merge-aware on another quantized weight than this one "
            f"({weight.spec}). {WAY_OUT}"
        )
