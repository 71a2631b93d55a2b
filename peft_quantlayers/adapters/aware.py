"""Merge-aware training: the forward pass runs through the weight that the merge will give.

``enable_merge_aware`` switches adapters over; from then on a layer computes with ``Q(W + change)``, where ``Q`` is the
rounding of ``QuantMethod.merged``, and merging those adapters changes no output. What was rounded against is written
into the adapter's config, travels with ``save_pretrained``, and is compared when the adapter is loaded or merged.
"""

from __future__ import annotations

import copy
import json
import zlib
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import TrainerCallback

from ..formats import QuantizedWeight
from ..quantizers import QuantMethod

# Of the rounding: an adapter is only worth its loss with the rounding that it was trained through.
ROUNDING_VERSION = 1


@dataclass
class MergeAwareLoraConfig(LoraConfig):
    """A ``LoraConfig`` of an adapter that was trained through the rounding of the merge. PEFT alone reads the rest.

    Attributes:
        merge_aware: ``{"rounding": version, "layers": {name: fingerprint of the quantized weight}}``; None for an
            ordinary adapter, and then not saved.
    """

    merge_aware: dict[str, Any] | None = field(
        default=None, metadata={"help": "What the adapter was rounded against while it was trained."}
    )

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's; an ordinary adapter is saved as if this class did not exist."""
        fields = super().to_dict()
        if self.merge_aware is None:
            fields.pop("merge_aware", None)
        return fields


def fingerprint(weight: QuantizedWeight) -> str:
    """A checksum of the spec and all tensors of ``weight``: equal for the same codes on the same grid only."""
    checksum = zlib.crc32(json.dumps(weight.spec.to_dict(), sort_keys=True).encode())
    for name in sorted(weight.tensors):
        stored = weight.tensors[name].detach().cpu().contiguous().view(torch.uint8)
        checksum = zlib.crc32(stored.numpy().data, checksum)
    return f"{checksum:08x}"


def has_merged_tiles(method: QuantMethod) -> bool:
    """Whether ``method`` can be trained through its own merge."""
    return type(method).merged_tiles is not QuantMethod.merged_tiles


def stamped(config: LoraConfig, layers: dict[str, str]) -> MergeAwareLoraConfig:
    """A copy of ``config`` that says what its adapter is rounded against: name and fingerprint of each layer."""
    aware = copy.copy(config)
    aware.__class__ = MergeAwareLoraConfig
    aware = cast(MergeAwareLoraConfig, aware)
    aware.merge_aware = {"rounding": ROUNDING_VERSION, "layers": layers}
    return aware


def stamp_of(config: Any) -> dict[str, Any] | None:
    """What :func:`stamped` wrote into ``config``, or None."""
    return getattr(config, "merge_aware", None)


def check_stamp(stamp: dict[str, Any], layer_name: str, weight: QuantizedWeight, *, adapter: str) -> None:
    """Raise ValueError unless the adapter was trained through the rounding of just this weight."""
    way_out = (
        'Load it on the base it was trained on, or merge it with strategy="requantize" after deleting "merge_aware" '
        "from its adapter_config.json."
    )
    if not isinstance(stamp, dict) or not isinstance(stamp.get("layers"), dict):
        raise ValueError(f"adapter {adapter!r}: merge_aware={stamp!r} in its config is damaged. {way_out}")
    if stamp.get("rounding") != ROUNDING_VERSION:
        raise ValueError(
            f"adapter {adapter!r} was trained through version {stamp.get('rounding')!r} of the rounding, and this is "
            f"version {ROUNDING_VERSION}: install the peft_quantlayers that it was trained with. {way_out}"
        )
    if stamp["layers"].get(layer_name) != fingerprint(weight):
        raise ValueError(
            f"{layer_name}: adapter {adapter!r} was trained merge-aware on another quantized weight than this one "
            f"({weight.spec}). {way_out}"
        )


def enable_merge_aware(model: nn.Module, adapters: list[str] | None = None) -> None:
    """Train adapters through the rounding that merges them, so that merging them loses nothing.

    From here on quantized layers with these adapters compute what the merged layer will, in training and in
    evaluation alike. Call it before the training, or when a part of it is done (``MergeAwareCallback``); the earlier
    the better. Layers that are not quantized train as ever. ``merge_back(strategy="aware")`` merges.

    Args:
        model: a PEFT model, or a transformers model with adapters, on a quantized base.
        adapters: names; None for the active ones. Adapters that are active together must all be aware.

    Raises:
        ValueError: no such adapter, none of its layers is quantized, ``lora_dropout`` is not 0, or an adapter is
            merged; nothing was changed.
        NotImplementedError: the adapter is more than plain LoRA (DoRA, QA-LoRA, ``lora_bias``, ...), or the method
            has no merge-aware training; nothing was changed.
    """
    from .lora import LoraQuantizedLinear

    configs = _configs(model)
    layers = [module for module in model.modules() if isinstance(module, LoraQuantizedLinear)]
    tuned = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    names = list(next(tuned).active_adapters) if adapters is None else adapters
    unknown = [name for name in names if name not in configs]
    if unknown or isinstance(adapters, str):
        raise ValueError(f"adapters={adapters!r}: give a list of names of {sorted(configs)}.")
    stamps: dict[str, dict[str, str]] = {}
    for name in names:
        concerned = [layer for layer in layers if name in layer.lora_A]
        if not concerned:
            raise ValueError(f"adapter {name!r} lies on no quantized layer: there is no rounding to train through.")
        for layer in concerned:
            _check_trainable(layer, name)
        bases = [layer.quantized_base() for layer in concerned]
        stamps[name] = {base.layer_name: fingerprint(base.quantized_weight) for base in bases}
    for name, stamp in stamps.items():
        configs[name] = stamped(configs[name], stamp)
        for layer in layers:
            if name in layer.lora_A:
                layer.aware_adapters[name] = stamp[layer.quantized_base().layer_name]


class MergeAwareCallback(TrainerCallback):
    """Turns merge-aware training on in a transformers ``Trainer``.

    Args:
        start_step: the optimizer step before which it is turned on; 0 for the whole training.
        adapters: as for :func:`enable_merge_aware`.
    """

    def __init__(self, start_step: int = 0, adapters: list[str] | None = None) -> None:
        if start_step < 0:
            raise ValueError(f"start_step={start_step} must be 0 or more.")
        self.start_step = start_step
        self.adapters = adapters
        self.is_on = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the Trainer before each optimizer step."""
        if not self.is_on and state.global_step >= self.start_step:
            enable_merge_aware(kwargs["model"], self.adapters)
            self.is_on = True


def _check_trainable(layer: Any, adapter: str) -> None:
    base = layer.quantized_base()
    where = f"{base.layer_name}: adapter {adapter!r}"
    if layer.merged:
        raise ValueError(
            f"{where} cannot be trained merge-aware while {layer.merged_adapters} are merged. Unmerge them."
        )
    if adapter in layer.lora_variant or layer.lora_bias[adapter]:
        raise NotImplementedError(
            f"{where} is more than plain LoRA. Merge-aware training knows plain LoRA and rsLoRA; QA-LoRA merges "
            "exactly without it, and other variants merge by requantization."
        )
    if not isinstance(layer.lora_dropout[adapter], nn.Identity):
        raise ValueError(
            f"{where} has lora_dropout: what is dropped at random cannot be rounded into a weight. Set lora_dropout=0."
        )
    if not has_merged_tiles(base.method):
        raise NotImplementedError(
            f"{base.layer_name}: {base.spec.method} weights have no merge-aware training. Use HQQ, or "
            'merge_back(strategy="keep").'
        )


def _configs(model: nn.Module) -> dict[str, Any]:
    """The adapter configs of ``model``, the very mapping that PEFT saves."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and configs:
            return configs
    raise ValueError("the model has no adapter. Add one with peft.get_peft_model(model, LoraConfig(...)).")
