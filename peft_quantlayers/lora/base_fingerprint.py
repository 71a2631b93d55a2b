"""Which quantized base an adapter was trained on: recorded beside its config, compared when it is loaded.

A LoRA adapter corrects the errors of the codes that it was trained on, so that on another base, or on the float model,
it computes something else, and nothing shows it. What is recorded is a checksum of a sample of each layer: reading all
codes would take seconds for every adapter, and another base differs nearly everywhere. Which transforms the base has
is recorded too: in another basis, or with other scales, an adapter's matrices mean something else.

May import layers, the record of transforms and PEFT's public classes.
"""

from __future__ import annotations

import copy
import warnings
import zlib
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..formats import QuantizedWeight
from ..formats.quantized_weight import stored_bytes
from ..layers.codes_parameter import as_codes, gathered, is_sharded
from ..layers.quantized_storage import QuantizedStorage
from ..layers.stack import QuantizedStack
from ..transforms.applied_transforms import are_transforms, in_words, transforms_of
from .embedding_layer import LoraQuantizedEmbedding
from .layer import LoraQuantizedLinear
from .merge_aware_config import BASE_FILE, MergeAwareLoraConfig, fingerprints_of
from .stack_layer import LoraQuantizedStack


class AnotherBaseWarning(UserWarning):
    """An adapter meets a base that it was not trained on."""


# Numbers of each tensor that are looked at, evenly spaced.
SAMPLE = 4096
# Layers that a warning names.
SHOWN_NAMES = 3


def sampled_fingerprint(weight: QuantizedWeight) -> str:
    """A checksum of shapes and of up to ``SAMPLE`` numbers of each tensor; empty where they are not all here.

    Not of the spec: published formats do not hold the settings of the quantizer that it names. Sharded tensors are
    gathered one by one, so that all processes must call this.
    """
    checksum = zlib.crc32(f"{weight.spec.method} {weight.shape}".encode())
    for name in sorted(weight.tensors):
        tensor = weight.tensors[name]
        if tensor.is_meta:
            return ""
        if is_sharded(tensor):
            tensor = gathered(tensor)
            if name == weight.spec.codes_name:
                tensor = as_codes(tensor, weight.spec.layout_of(weight.shape)[name].dtype)
        checksum = zlib.crc32(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode(), checksum)
        flat = tensor.detach().reshape(-1)
        checksum = zlib.crc32(stored_bytes(flat[:: max(1, flat.numel() // SAMPLE)]), checksum)
    return f"{checksum:08x}"


def base_fingerprints(model: nn.Module) -> dict[str, str]:
    """The fingerprint of each quantized layer of ``model``, without merges, by the name of the module in its place.

    Layers whose tensors are offloaded are left out.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        place = _place(name, module)
        if isinstance(module, (LoraQuantizedLinear, LoraQuantizedStack, LoraQuantizedEmbedding)):
            weight = module.unmerged_snapshot().weight
        elif isinstance(module, QuantizedStorage) and place not in found:
            weight = module.quantized_weight
        else:
            continue
        fingerprint = "" if weight is None else sampled_fingerprint(weight)
        if fingerprint:
            found[place] = fingerprint
    return found


def _place(name: str, module: nn.Module) -> str:
    """The name of the quantized layer under ``module`` in the model without adapters; a stack's is its parameter's."""
    if isinstance(module, LoraQuantizedStack):
        return f"{name.replace('.base_layer', '')}.{module.parameter_name}"
    return name.replace(".base_layer", "") if isinstance(module, QuantizedStack) else name.removesuffix(".base_layer")


def _carries(module: nn.Module, adapter: str) -> bool:
    """Whether ``module`` is LoRA on a quantized layer, with ``adapter`` among its adapters."""
    if isinstance(module, LoraQuantizedEmbedding):
        return adapter in module.lora_embedding_A
    return isinstance(module, (LoraQuantizedLinear, LoraQuantizedStack)) and adapter in module.lora_A


def is_recorded(config: Any) -> bool:
    """Whether adapters of ``config`` record their base: LoRA, and no subclass with a config file of its own."""
    return type(config) in (LoraConfig, MergeAwareLoraConfig)


def recorded(config: LoraConfig, found: Mapping[str, str], model: nn.Module, adapter: str) -> LoraConfig:
    """A copy of ``config`` that records the fingerprints ``found`` of the layers that carry ``adapter``, and which
    transforms the base has.

    ``config`` itself where it has a record already, or if none of these layers is quantized and none is transformed.
    """
    layers = {
        place: found[place]
        for name, module in model.named_modules()
        if _carries(module, adapter)
        if (place := _place(name, module)) in found
    }
    transforms = transforms_of(model)
    if not (layers or transforms) or getattr(config, "quantized_base", None) is not None:
        return config
    own = MergeAwareLoraConfig.of(config)
    own.quantized_base = {"layers": layers} | ({"transforms": transforms} if transforms else {})
    return own


def record_again(model: nn.Module, configs: dict[str, Any], adapter: str) -> None:
    """Update the record of ``adapter`` in ``configs`` after the codes under it were changed on purpose."""
    if is_recorded(configs[adapter]):
        blank = copy.copy(configs[adapter])
        blank.quantized_base = None
        configs[adapter] = recorded(blank, base_fingerprints(model), model, adapter)


def layers_of_record(config: Any) -> dict[str, str]:
    """Fingerprint by layer, as ``config`` records them; empty without a record.

    Raises:
        ValueError: the record is damaged.
    """
    record = getattr(config, "quantized_base", None)
    if record is None:
        return {}
    layers: Any = record.get("layers") if isinstance(record, dict) else None
    are_known = isinstance(layers, dict) and all(isinstance(print_, str) for print_ in layers.values())
    if not are_known or not are_transforms(record.get("transforms", [])):
        raise ValueError(
            f"the adapter's {BASE_FILE} is damaged: {record!r}. Delete it to load the adapter without a comparison of "
            "the bases."
        )
    return layers


def warn_of_another_base(config: Any, found: Mapping[str, str], model: nn.Module, adapter: str) -> None:
    """Warn if ``model``, whose layers have the fingerprints ``found``, is not the base that the adapter had."""
    layers = layers_of_record(config)
    transforms = (getattr(config, "quantized_base", None) or {}).get("transforms", [])
    # A merge-aware adapter is refused on another base.
    if not (layers or transforms) or fingerprints_of(config) is not None:
        return
    modules: dict[str, Any] = dict(model.named_parameters()) | dict(model.named_modules())
    dense = [name for name in layers if name in modules and not isinstance(_base(modules[name]), QuantizedStorage)]
    others = [name for name, print_ in layers.items() if found.get(name, print_) != print_]
    if transforms != transforms_of(model):
        here_words, there_words = in_words(transforms_of(model)), in_words(transforms)
        said = f"its transforms are {here_words}, and those of the adapter's base {there_words}"
        way_out = "Load the base that it was trained on, or do the same transforms first."
    elif dense:
        said = f"here {_some(dense)} are not quantized ({len(dense)} of {len(layers)} layers)"
        way_out = "Load the base quantized (AutoPeftModel takes quantization_config=...)."
    elif others:
        said = f"here {_some(others)} have other codes, scales or zeros ({len(others)} of {len(layers)} layers)"
        way_out = "Load the base that it was trained on."
    else:
        return
    kind = "quantized base" if layers else "base"
    here = getattr(model, "name_or_path", "") or type(model).__name__
    warnings.warn(
        f"adapter {adapter!r} was trained on the {kind} {config.base_model_name_or_path!r}, and this is "
        f"another one, {here!r}: {said}. It will compute something else than it was trained to. {way_out}",
        AnotherBaseWarning,
        stacklevel=3,  # PEFT's injection
    )


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN_NAMES]) + (", ..." if len(names) > SHOWN_NAMES else "")
