"""Which golden files there are, and what is compared of a saved model."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# Models in formats that we write: saved again they are the same files.
MODELS = ("hqq", "hqq_mixed", "hqq_aqlm", "branches", "aqlm", "conv1d", "compute_dtype")
# Models as transformers 4 and the hqq package wrote them: saved again they are in our format.
PUBLISHED = ("published_hqq", "hqq_package_folder")
# Each adapter, and the model that it lies on.
ADAPTERS = {"lora": "hqq", "merge_aware": "hqq", "quant_scales": "hqq", "qalora": "hqq"}


def quantization_config(folder: str | Path) -> Any:
    """The part of ``config.json`` that says what is quantized, as JSON."""
    return json.loads((Path(folder) / "config.json").read_text())["quantization_config"]


def tensors_of(file: str | Path) -> dict[str, Tensor]:
    """All that a safetensors file holds."""
    with safe_open(file, framework="pt") as stored:
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


def digest(tensor: Tensor) -> str:
    """Dtype, shape and a checksum of the bytes."""
    data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return f"{tensor.dtype} {list(tensor.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


def digests(file: str | Path) -> dict[str, str]:
    """:func:`digest` of each tensor in a safetensors file, or in that of a model's or adapter's folder."""
    files = [Path(file)] if Path(file).is_file() else sorted(Path(file).glob("*.safetensors"))
    return {name: digest(tensor) for path in files for name, tensor in tensors_of(path).items()}


def assert_written(folder: Path, config: dict[str, Any], tensors: dict[str, str]) -> None:
    """``folder`` holds what an older version wrote, and where the format is ours the sentinels of the fourth."""
    sentinels = [f"{name}.weight" for name in config.get("modules", ())] if "sentinels" not in config else []
    if sentinels:
        config = config | {"sentinels": True, "format_version": max(config["format_version"], 4)}
    assert quantization_config(folder) == config
    found = digests(folder)
    assert all(" [1] " in found.pop(name) for name in sentinels)
    assert found == tensors
