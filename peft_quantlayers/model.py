"""Whole models: quantize one that is in memory, and save it so that nothing is lost on the way."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .adapters import has_adapters
from .calibration import Calibration, LayerResult, quantize_calibrated
from .integrations.quantizer import QuantlayersHfQuantizer
from .layers import quantize_modules, quantized_modules
from .layers.replace import checked_modules
from .quantizers import QuantConfig


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    *,
    calibration: Any = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    on_layer: Callable[[LayerResult], None] | None = None,
) -> nn.Module:
    """Quantize the linear layers of ``model`` in place, one at a time, and return it.

    Every layer is checked before the first is touched, so that a refused call leaves the model as it was. The
    float weight of a layer is released as soon as its codes are made.

    Args:
        model: any module. A transformers model saves, loads and trains afterwards as a quantized model.
        config: the method, and exceptions by name; for example ``HQQConfig(nbits=4)``.
        calibration: texts, token ids, a dataset, or a :class:`Calibration` around them. With it the error that is
            minimised is that of each layer's outputs on this data instead of that of its weight; the format stays the
            same. HQQ needs ``axis=1`` for it.
        tokenizer: for texts, where ``calibration`` is no :class:`Calibration`; None for the model's own.
        device: where to quantize, for example ``"cuda"`` for a model that lies in CPU memory; the quantized layer
            goes back to where the weight was. None to quantize each weight where it is.
        progress: show a progress bar.
        on_layer: called after each layer with what quantizing did to it; only with ``calibration``.

    Raises:
        TypeError: ``config`` is no QuantConfig; calibration data of an unknown kind.
        ValueError: the model carries adapters; nothing to quantize; a layer is quantized already; a shape does not
            fit the config; a pattern matches no module; a weight holds NaN or Inf; too little
            calibration data. The model is as it was.
    """
    if not isinstance(config, QuantConfig):
        raise TypeError(
            f"config must be an HQQConfig or another QuantConfig, got {type(config).__name__}. From a mapping of "
            "fields: HQQConfig(**fields)."
        )
    if has_adapters(model):
        raise ValueError(
            "the model carries PEFT adapters, whose own matrices would be quantized too. Quantize the model first and "
            "add adapters then; or merge them first with merge_and_unload()."
        )
    if calibration is None:
        quantize_modules(model, config, device=device, progress=progress)
    else:
        quantize_calibrated(
            model,
            checked_modules(model, config),
            config,
            Calibration.of(calibration, tokenizer),
            device=device,
            progress=progress,
            on_layer=on_layer,
        )
    if isinstance(model, PreTrainedModel):
        QuantlayersHfQuantizer.attached_to(model)
    return model


def save_model(
    model: PreTrainedModel, folder: str | Path, *, tokenizer: Any = None, overwrite: bool = False, **kwargs: Any
) -> None:
    """Save a quantized model whole or not at all, with a model card that says how to load it.

    Everything is written beside ``folder`` first and then moved there.

    Args:
        model: a transformers model; a dense one (``merge_back(strategy="dense")``) is saved without a card.
        folder: where to; must not exist or be empty, unless ``overwrite``.
        tokenizer: saved along with it, if given.
        overwrite: replace the model in ``folder``: files of the same names, and all its safetensors. Others stay.
        kwargs: for transformers' ``save_pretrained``, for example ``max_shard_size="2GB"``.

    Raises:
        FileExistsError: ``folder`` holds files; nothing was written.
        ValueError: the model carries adapters; nothing was written.
    """
    folder = Path(folder)
    if has_adapters(model):
        raise ValueError(
            "the model carries PEFT adapters, and would be saved as if it had none; nothing was written. Merge them "
            "first (peft_quantlayers.merge_back), or save the adapter with its own save_pretrained."
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder; nothing was written.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{folder} exists and is not empty; nothing was written. Choose another folder, or pass overwrite=True to "
            "replace the model in it (other files stay)."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(written, **kwargs)
        if tokenizer is not None:
            tokenizer.save_pretrained(written)
        if quantized_modules(model):
            (written / "README.md").write_text(_model_card(model))
        written.chmod(0o777 & ~_umask())
        if folder.exists() and any(folder.iterdir()):
            _replace_model(folder, written)
        else:
            written.replace(folder)
    except BaseException:
        shutil.rmtree(written, ignore_errors=True)
        raise


def _replace_model(folder: Path, written: Path) -> None:
    """Move the files of ``written`` into ``folder``, and remove the weights of the model that was there."""
    names = {file.name for file in written.iterdir()}
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        if old.name not in names:
            old.unlink()
    for file in written.iterdir():
        file.replace(folder / file.name)
    written.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _model_card(model: PreTrainedModel) -> str:
    layers = quantized_modules(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers.values())
    bits = sum(layer.bits_per_weight * layer.in_features * layer.out_features for layer in layers.values()) / max(
        1, weights
    )
    specs = sorted({str(layer.spec) for layer in layers.values()})
    return "\n".join(
        [
            "---",
            "library_name: peft_quantlayers",
            "tags: [quantized, quantlayers]",
            "---",
            "",
            "**Load this model with `peft_quantlayers`; without its import transformers would fill the quantized",
            "layers with random numbers, and say so only in a warning.**",
            "",
            "```python",
            "import peft_quantlayers",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("path/or/name")',
            "```",
            "",
            f"{len(layers)} linear layers, {weights:,} weights at {bits:.2f} bits each, metadata included:",
            "",
            *[f"- `{spec}`" for spec in specs],
            "",
        ]
    )
