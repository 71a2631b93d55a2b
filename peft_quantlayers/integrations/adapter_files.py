"""What an adapter's files hold, checked when PEFT loads them onto a model with quantized layers.

PEFT loads what fits, warns of what is missing and drops the rest; the configs of our adapters name every layer, so
that here it is an error. PEFT has added the adapter to the model by then.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from ..lora.base_fingerprint import layers_of_record
from ..lora.merge_aware_config import fingerprints_of
from ..scales.scales_config import QuantScalesConfig

# Names that an error message shows.
SHOWN_NAMES = 3
# Parts of the names of tensors that are floats in every adapter of ours.
OUR_TENSORS = (".lora_", ".quant_scales_")


def local_file(model_id: Any, subfolder: str | None) -> Path | None:
    """The safetensors file of an adapter in a folder; None for one on the Hub, or a pickle."""
    file = Path(os.fspath(model_id), subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    return file if file.is_file() else None


def check_file(file: Path) -> None:
    """Raise ValueError, naming ``file``, if it is damaged or holds integers where an adapter has floats."""
    try:
        with safe_open(file, framework="pt") as opened:
            # In the dtype of the file: PEFT would cast them.
            empty = {key: opened.get_slice(key)[:0].dtype for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or incomplete ({error}). Copy or download the adapter again.") from None
    wrong = [key for key, dtype in empty.items() if not dtype.is_floating_point and any(p in key for p in OUR_TENSORS)]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]} holds {empty[wrong[0]]} and no floats. The file is damaged.")


def check_scaling(config: Any) -> None:
    """Raise ValueError if ``lora_alpha`` or one of ``alpha_pattern`` is no finite number: JSON may say NaN."""
    alphas = {"lora_alpha": getattr(config, "lora_alpha", 1)}
    alphas |= {
        f"alpha_pattern[{key!r}]": value for key, value in (getattr(config, "alpha_pattern", None) or {}).items()
    }
    for name, alpha in alphas.items():
        if not isinstance(alpha, SupportsFloat) or not math.isfinite(alpha):
            raise ValueError(
                f"{name}={alpha!r} must be a finite number: every output of the adapter would be lost. Correct it in "
                "the LoraConfig, or in the adapter's adapter_config.json. The model was not changed."
            )


def check_loaded(model: nn.Module, config: Any, adapter: str, result: Any, source: Any) -> None:
    """Raise ValueError, naming ``source``, if an adapter lacks tensors that its config names, or is not finite.

    Args:
        model: the PEFT model.
        config: of the adapter.
        adapter: its name.
        result: what PEFT's loading gave, with ``missing_keys`` and ``unexpected_keys``.
        source: the file, or the name on the Hub.
    """
    is_strict = isinstance(config, QuantScalesConfig) or fingerprints_of(config) is not None
    layers = layers_of_record(config)
    if getattr(config, "target_parameters", None):  # adapters of stacks lie beside the module that holds them
        layers = [*layers, *{name.rpartition(".")[0] for name in layers if name.split(".")[-2:-1] == ["experts"]}]
    missing = [key for key in result.missing_keys if is_strict or any(f".{name}." in key for name in layers)]
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} tensor(s) of the adapter, for example {missing[:SHOWN_NAMES]}, which "
            "would keep the values that they started with. The file is incomplete; copy or download it again."
        )
    unexpected = list(getattr(result, "unexpected_keys", ()))
    if is_strict and unexpected:
        raise ValueError(
            f"{source} holds {len(unexpected)} tensor(s), for example {unexpected[:SHOWN_NAMES]}, for which "
            "adapter_config.json has no place: target_modules, train or another field was changed or lost."
        )
    for name, parameter in model.named_parameters():
        is_here = adapter in name.split(".") and parameter.is_floating_point() and not parameter.is_meta
        if is_here and not torch.isfinite(parameter).all():
            raise ValueError(f"{source}: {name} holds NaN or Inf. The adapter is damaged, or its training failed.")
