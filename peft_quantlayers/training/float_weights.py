"""The float weights of a model that is quantized by now: from the model before, its folder or its name on the hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download
from torch import Tensor, nn

from ..integrations.checkpoint_headers import CheckpointFiles
from ..integrations.checkpoint_names import CheckpointNames
from ..layers import QuantizedLinear
from ..lora import LoraQuantizedLinear


def float_weights(float_model: nn.Module | str | Path, model: nn.Module, names: list[str]) -> Callable[[str], Tensor]:
    """Reads the float weight of a layer by its name; all ``names`` are there.

    Raises:
        ValueError: ``float_model`` is not found, lacks a weight, or is quantized itself.
    """
    if isinstance(float_model, nn.Module):
        modules = dict(float_model.named_modules())
        _refuse_missing([name for name in names if not hasattr(modules.get(name), "weight")], names)
        quantized = [name for name in names if isinstance(modules[name], (QuantizedLinear, LoraQuantizedLinear))]
        if quantized:
            raise ValueError(f"{quantized[0]}: float_model is quantized itself. Load it without quantizing it.")
        return lambda name: cast(Tensor, modules[name].weight).detach()
    folder = Path(float_model)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(str(float_model), allow_patterns=["*.safetensors"]))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"float_model={str(float_model)!r} is not a folder, and the hub did not give it: {error}"
            ) from None
    files = CheckpointFiles(str(file) for file in sorted(folder.glob("*.safetensors")))
    parameters = CheckpointNames(model, layers=names).parameters(files.headers)
    stored = {name.removesuffix(".weight"): key for key, name in parameters.items() if name.endswith(".weight")}
    _refuse_missing([name for name in names if name not in stored], names)

    return lambda name: files.read(stored[name])


def _refuse_missing(missing: list[str], names: list[str]) -> None:
    if missing:
        raise ValueError(
            f"float_model has no weight for {len(missing)} of {len(names)} layers, for example {missing[0]!r}. Give "
            "the model that was quantized; where its files name the layers otherwise, load it and give the model."
        )
