"""Whole models: quantize one that is in memory, and save it so that nothing is lost on the way."""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .calibration import Calibration, LayerResult, quantize_calibrated
from .integrations.transformers_quantizer import QuantlayersHfQuantizer
from .layers import quantized_modules
from .layers.replace import quantize_each
from .layers.selection import checked_modules, finished_modules
from .lora import has_adapters
from .methods import QuantConfig

logger = logging.getLogger(__name__)


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
    float weight of a layer is released as soon as its codes are made. A call that is interrupted leaves a model whose
    remaining layers are dense; it saves and loads as that, and another call with the same config does the rest.

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
        ValueError: the model carries adapters; nothing to quantize; a layer is quantized already to another spec; a
            shape does not fit the config; a pattern matches no module; a weight holds NaN or Inf; too little
            calibration data; block finetuning or a resume folder for a model that is quantized in part. The model is
            as it was.
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
    specs = checked_modules(model, config)
    given = None if calibration is None else Calibration.of(calibration, tokenizer)
    if given is not None and finished_modules(model, config):
        _refuse_lost_targets(given)
    with _described(model, n_planned=len(specs)):
        if given is None:
            quantize_each(model, specs, config, device=device, progress=progress)
        else:
            quantize_calibrated(model, specs, config, given, device=device, progress=progress, on_layer=on_layer)
    return model


def _refuse_lost_targets(calibration: Calibration) -> None:
    """Of a model that is quantized in part the float outputs are gone, and with them what identifies its blocks."""
    if calibration.finetune_epochs or calibration.resume_folder is not None:
        raise ValueError(
            "some layers are quantized already, and block finetuning and resume_folder need the float model; nothing "
            "was changed. Load the float model again (finished blocks are taken from resume_folder), or go on with "
            "finetune_epochs=0 and resume_folder=None."
        )


@contextmanager
def _described(model: nn.Module, *, n_planned: int) -> Iterator[None]:
    """Make a transformers model known as quantized with the layers that are, also where an error ends this early."""
    n_before = len(quantized_modules(model))
    try:
        yield
    except BaseException:
        if n_done := len(quantized_modules(model)) - n_before:
            logger.warning(
                "quantizing was interrupted: %d of %d layers are quantized, the others are dense still. The model "
                "works, saves and loads as that; quantize_model with the same config goes on with the rest.",
                n_done,
                n_planned,
            )
        raise
    finally:
        if isinstance(model, PreTrainedModel) and len(quantized_modules(model)) > n_before:
            QuantlayersHfQuantizer.attached_to(model)


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
