"""What an adapter's files hold: checked before and after PEFT loads them onto a model with quantized layers.

PEFT loads what fits, warns of what is missing and drops the rest; the configs of our adapters name every layer, so
that here it is an error.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, SupportsFloat

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import nn

from ..formats.checksums import are_checksums_used, checksums, to_metadata
from ..formats.safetensors_file import StoredTensor, write_safetensors
from ..lora.adapter_folder import refuse_special_files
from ..lora.base_fingerprint import layers_of_record
from ..lora.merge_aware_config import fingerprints_of
from ..scales.scales_config import QuantScalesConfig
from ..storage import replace_file
from .checkpoint_checksums import refuse_damage
from .checkpoint_headers import CheckpointFiles

# Names that an error message shows.
SHOWN_NAMES = 3
# Parts of the names of tensors that are floats in every adapter of ours.
OUR_TENSORS = (".lora_", ".quant_scales_")


def check_folder(model_id: Any, subfolder: str | None, *, with_config: bool = True) -> Path | None:
    """The safetensors file of an adapter in a folder, checked; None for one on the Hub, or a pickle.

    Args:
        model_id: a folder, or a name on the Hub.
        subfolder: of it.
        with_config: whether adapter_config.json will be read too.

    Raises:
        TypeError, ValueError: a file is damaged or holds what no adapter has; names the file.
    """
    folder = Path(os.fspath(model_id), subfolder or "")
    if not folder.is_dir():
        return None
    refuse_special_files(folder)
    if with_config and (folder / CONFIG_NAME).is_file():
        _check_config(folder / CONFIG_NAME)
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        return None
    check_file(file)
    return file


def cached_file(model_id: Any, **options: Any) -> Path | None:
    """The safetensors file of an adapter that was just downloaded from the Hub; None where there is none.

    ``options`` are those of the download, and ``subfolder``.
    """
    name = "/".join(filter(None, (options.get("subfolder"), SAFETENSORS_WEIGHTS_NAME)))
    options = {key: options[key] for key in ("cache_dir", "revision") if options.get(key) is not None}
    found = try_to_load_from_cache(str(model_id), name, **options)
    return Path(found) if isinstance(found, str) else None


def _check_config(file: Path) -> None:
    """Raise TypeError or ValueError, naming ``file``, unless it is the config of an adapter."""
    try:
        fields = json.loads(file.read_text())
        kind = fields["peft_type"]
        config_type = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        said = str(error) if isinstance(error, ValueError) else "it does not name a method of PEFT as peft_type"
        raise ValueError(f"{file} is damaged ({said}). Copy or download the adapter again.") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when PEFT reads it
            config = config_type.from_pretrained(str(file.parent))
        layers_of_record(config)
        check_scaling(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raised = TypeError if isinstance(error, TypeError) else ValueError
        raise raised(f"{file} holds what the config of an adapter cannot hold: {error}") from error


def check_file(file: Path) -> None:
    """Raise ValueError, naming ``file``, if it is damaged or holds integers where an adapter has floats."""
    files = CheckpointFiles([str(file)])
    for key, header in files.headers.items():
        if any(part in key for part in OUR_TENSORS):
            # In the dtype of the file: PEFT would cast it.
            dtype = (files.slice(key)[:0] if header.shape else files.read(key)).dtype
            if not dtype.is_floating_point:
                raise ValueError(f"{file}: {key} holds {dtype} and no floats. The file is damaged.")
    refuse_damage(files.opened, name=f"the adapter {file}")


def add_checksums(file: Path) -> None:
    """Write the checksums of all tensors of a safetensors file into its header, in a new file of that name."""
    if not are_checksums_used() or not file.is_file():
        return
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    layout = {key: StoredTensor.of(tensor) for key, tensor in tensors.items()}
    with replace_file(file) as part:  # safetensors' own writer gives metadata a random order
        write_safetensors(part, layout, tensors.__getitem__, metadata=metadata | to_metadata(checksums(tensors)))


def check_scaling(config: Any) -> None:
    """Raise ValueError if ``lora_alpha`` or one of ``alpha_pattern`` is no finite number: JSON may say NaN."""
    alpha = getattr(config, "lora_alpha", None)  # other methods may leave it open
    alphas = {"lora_alpha": alpha} if alpha is not None or isinstance(config, LoraConfig) else {}
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
    missing = [key for key in result.missing_keys if is_strict or any(f".{name}." in f".{key}" for name in layers)]
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
