"""Adapters beside an exported base: read from PEFT's folder, refused by name where an engine cannot, and joined.

An adapter here is two factors for each layer, scaling included. Besides the user's there are those that exporting
makes: the rounding of zeros (``approximate="adapter"``), and the low-rank branches of a merge with ``keep``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..arguments import nearest
from ..lora.base_fingerprint import sampled_fingerprint
from ..lora.merge_aware_config import BASE_FILE
from .export_source import ModelSource
from .formats.format_base import LowRank
from .source_layer import SourceLayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_MERGE_FIRST = "Merge it first (peft_quantlayers.merge_back), and export the merged model."
# Initialisations that also change the weights of the base: the adapter belongs to the changed ones.
_SHIFTING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Fields of a LoraConfig that change what the adapter computes, and what each is, in words.
_VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QA-LoRA",
    "lora_bias": "a bias of the adapter",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "embeddings of single tokens (trainable_token_indices)",
    "target_parameters": "an adapter on experts (target_parameters)",
    "layer_replication": "replicated layers (layer_replication)",
    "alora_invocation_tokens": "aLoRA",
    "arrow_config": "Arrow",
    "megatron_config": "Megatron",
}


class Adapter:
    """A LoRA adapter of a model: two factors for each layer that it changes.

    Attributes:
        factors: A (r, in_features) and B (out_features, r), float32, by the name of the layer in the model's files.
    """

    def __init__(self, factors: Mapping[str, LowRank] | None = None) -> None:
        self.factors: dict[str, LowRank] = dict(factors or {})

    def add(self, other: Mapping[str, LowRank]) -> None:
        """Add the deltas of ``other`` to this adapter's."""
        for name, (A, B) in other.items():
            A, B = A.float(), B.float()
            if name in self.factors:
                own_A, own_B = self.factors[name]
                A, B = torch.cat([own_A, A]), torch.cat([own_B, B], dim=1)
            self.factors[name] = (A, B)

    @property
    def rank(self) -> int:
        """The largest rank of a layer; 0 for an empty adapter."""
        return max((len(A) for A, _ in self.factors.values()), default=0)

    def padded(self) -> dict[str, LowRank]:
        """The factors, all of one rank: engines read one for the whole adapter."""
        found = {}
        for name, (A, B) in self.factors.items():
            missing = self.rank - len(A)
            found[name] = (
                torch.nn.functional.pad(A, (0, 0, 0, missing)).contiguous(),
                torch.nn.functional.pad(B, (0, missing)).contiguous(),
            )
        return found


def read_adapter(folder: Path, source_modules: Mapping[str, tuple[str, tuple[int, int]]]) -> Adapter:
    """The LoRA adapter that PEFT saved in ``folder``.

    Args:
        folder: with adapter_config.json and adapter_model.safetensors.
        source_modules: of each linear module of the model, its name in the files and (out_features, in_features).

    Raises:
        FileNotFoundError: no adapter is there.
        NotImplementedError: an adapter that engines do not read; says which kind, and what to do.
        ValueError: it belongs to another model, or is damaged.
    """
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} holds no {file}: no adapter of PEFT is in it. Nothing was written.")
    config = _json_of(folder / CONFIG)
    _refuse_variants(folder, config)
    stored: dict[str, dict[str, Tensor]] = {}
    with _opened(folder / WEIGHTS) as opened:
        for key in opened.keys():  # noqa: SIM118
            found = _KEY.fullmatch(key)
            if found is None:
                raise NotImplementedError(
                    f"{folder}: the adapter holds {key!r}, which is no factor of LoRA on a linear layer. "
                    f"{_MERGE_FIRST} Nothing was written."
                )
            stored.setdefault(found[1], {})[found[2]] = opened.get_tensor(key).float()
    factors = {}
    for module, parts in stored.items():
        if module not in source_modules:
            raise ValueError(
                f"{folder}: the adapter has a layer {module!r}, and the model has none of that name"
                f"{nearest(module, source_modules)}. They do not belong together. Nothing was written."
            )
        name, (out_features, in_features) = source_modules[module]
        A, B = parts.get("A"), parts.get("B")
        if A is None or B is None or A.shape[1] != in_features or B.shape != (out_features, len(A)):
            raise ValueError(
                f"{folder}: the factors of {module} do not fit a layer of shape {(out_features, in_features)}. The "
                "adapter is damaged, or belongs to another model. Nothing was written."
            )
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ValueError(f"{folder}: the factors of {module} hold NaN or Inf. Nothing was written.")
        factors[name] = (A, B * _scaling(config, module, len(A)))
    return Adapter(factors)


def another_base(
    folder: Path, source_modules: Mapping[str, tuple[str, Any]], layers: Mapping[str, SourceLayer]
) -> str:
    """A sentence if the adapter in ``folder`` records other quantized layers than ``layers``; empty otherwise.

    Args:
        folder: of the adapter.
        source_modules: of each linear module of the model, its name in the files first.
        layers: the quantized layers by their names in the files.
    """
    file = folder / BASE_FILE
    recorded = _json_of(file).get("layers", {}) if file.is_file() else {}
    names = {module: source_modules[module][0] for module in recorded if module in source_modules}
    others = [
        module
        for module, name in names.items()
        if name not in layers or sampled_fingerprint(layers[name].weight()) != recorded[module]
    ]
    if not others:
        return ""
    return (
        f"The adapter was trained on another quantized base: {others[0]} is another one there ({len(others)} of "
        f"{len(names)} layers). It will compute something else than it was trained to."
    )


def _json_of(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}). Copy or download it again. Nothing was written.") from None


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}). Copy or download it again. Nothing was written.") from None


def branches_of(source: ModelSource) -> dict[str, LowRank]:
    """The low-rank branches of the layers."""
    return {name: layer.branch() for name, layer in source.layers.items() if layer.branch is not None}


def _refuse_variants(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    refused = [words for field, words in _VARIANTS.items() if config.get(field)]
    refused += [
        field
        for field in config
        if field.startswith("use_") and config[field] and field not in ("use_rslora", *_VARIANTS)
    ]
    if config.get("bias", "none") != "none":
        refused.append(f"trained biases (bias={config['bias']!r})")
    if kind != "LORA":
        refused = [f"an adapter of the kind {kind}"]
    if refused:
        raise NotImplementedError(
            f"{folder}: no engine reads {', '.join(refused)}. {_MERGE_FIRST} Nothing was written."
        )
    init = str(config.get("init_lora_weights", ""))
    if init.startswith(_SHIFTING_INITS):
        raise NotImplementedError(
            f"{folder}: init_lora_weights={init!r} changed the base when the adapter was made, and engines would add "
            f"it to the unchanged one. {_MERGE_FIRST} Or convert it: PEFT's save_pretrained(folder, "
            "path_initial_model_for_weight_conversion=...). Nothing was written."
        )
    if config.get("merge_aware"):
        raise NotImplementedError(
            f"{folder}: the adapter was trained through the rounding of its merge, and computes something else beside "
            f"the base. {_MERGE_FIRST} Nothing was written."
        )


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(pattern: Mapping[str, Any] | None, module: str, default: float) -> float:
    """As PEFT looks values up: a key is a regular expression for the end of a module's name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
