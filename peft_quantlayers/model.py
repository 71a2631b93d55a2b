"""Quantize a whole model that is in memory."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .arguments import (
    check_callable,
    check_device,
    check_flag,
    check_model,
    check_tokenizer,
)
from .bit_allocation import BitPlan
from .bit_allocation.quantizing_under_budget import measured, plan_of, refuse_budget, with_plan
from .calibration import Calibration, LayerResult, quantize_calibrated
from .calibration.quantize_calibrated import check_can_calibrate
from .integrations.attached_quantizers import attach_quantizers
from .layers.other_quantizers import refuse_other_quantizers
from .layers.placement import check_weights_are_here
from .layers.quantized_layers import quantized_layers
from .layers.replace import quantize_each, quantize_tables
from .layers.selection import checked_modules, finished_modules, quantizable_tables
from .lora import has_adapters
from .methods import QuantConfig
from .methods.quant_config import check_config
from .transforms import Transform, transform_model

logger = logging.getLogger(__name__)


def quantize_model(
    model: nn.Module,
    config: QuantConfig,
    *,
    calibration: Any = None,
    transforms: Transform | Sequence[Transform] | None = None,
    budget: float | str | Path | BitPlan | None = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    on_layer: Callable[[LayerResult], None] | None = None,
) -> nn.Module:
    """Quantize the linear layers of ``model``, and the fused experts of a mixture, in place, one at a time; return it.

    Every layer is checked before the first one changes, so a refused call leaves the model as it was. A layer's float
    weight is released as soon as the layer is quantized. An interrupted call leaves the remaining layers dense: the
    model saves and loads in that state, and another call with the same config quantizes the rest.

    Args:
        model: any module. A transformers model saves, loads and trains afterwards as a quantized model.
        config: the method, and overrides by name; for example ``HQQConfig(nbits=4)``.
        calibration: texts, token ids, a dataset, batches for the model's forward, or a :class:`Calibration` around
            them. If given, minimises each layer's output error on this data instead of its weight error; the format
            stays the same. HQQ then needs ``axis=1``. Layers that the data does not reach (a vision tower without
            images) are quantized without it, with a warning that names them.
        transforms: changes of the float weights before they are quantized, after which they quantize better; see
            :func:`transform_model`. If quantizing is refused or interrupted after them, the model has them already,
            computes what it did, and says so in ``model.config``.
        budget: stored bits per weight, scales included (3.5), the size of the model's tensors ("4GB"), or a plan of
            :func:`plan_bits` or the file that it was saved in (``Path("plan.json")``): layers get more or fewer bits
            than ``config`` says by what they cost the predictions. With ``calibration``, what the plan predicted and
            what was measured afterwards is logged, and set in a plan that was given.
        tokenizer: for texts, unless ``calibration`` is a :class:`Calibration`; None for the model's own.
        device: where to quantize, for example ``"cuda"`` for a model in CPU memory; the quantized layer returns to
            the device of the weight. None to quantize each weight on its own device.
        progress: show a progress bar.
        on_layer: called after each layer with its errors; only with ``calibration``.

    Raises:
        TypeError: ``model`` is not a module, ``config`` not a QuantConfig; calibration data of an unknown kind.
        ValueError: the model carries adapters; another library has quantized it; its weights are offloaded, sharded or
            on the meta device; nothing to quantize; a layer is quantized already to another spec; a shape does not fit
            the config, with ``on_misfit="refuse"``; a pattern matches no module; a weight holds NaN or Inf; too little
            calibration data; block finetuning, asymmetric targets or a resume folder for a model that is quantized in
            part. The model is as it was.
    """
    _check_arguments(model, config, tokenizer, device, progress, on_layer, is_calibrated=calibration is not None)
    if has_adapters(model):
        raise ValueError(
            "the model carries PEFT adapters, whose own matrices would be quantized too. Quantize the model first and "
            "add adapters then; or merge them first with merge_and_unload()."
        )
    refuse_other_quantizers(model)
    given = None if calibration is None else Calibration.of(calibration, tokenizer)
    if transforms is not None:
        if given is not None:
            check_can_calibrate(checked_modules(model, config), given)
            given.batches(model)  # refuses the data
        if budget is not None:
            refuse_budget(model, config, budget, given)
        transform_model(model, transforms, config=config, calibration=given, device=device, progress=progress)
    plan = None if budget is None else plan_of(model, config, budget, given, progress=progress)
    if plan is not None:
        config = with_plan(config, plan)
    specs, tables = checked_modules(model, config), quantizable_tables(model, config)
    if given is not None and finished_modules(model, config):
        _refuse_lost_targets(given)
        given = given.of_float_model(is_whole=False)
    with (
        nullcontext() if plan is None else measured(model, plan, given),
        _described(model, n_planned=len(specs) + len(tables)),
    ):
        if given is None or not specs:
            quantize_each(model, specs, config, device=device, progress=progress)
        else:
            quantize_calibrated(model, specs, config, given, device=device, progress=progress, on_layer=on_layer)
        quantize_tables(model, tables, config, device=device)
    return model


def _check_arguments(
    model: Any,
    config: Any,
    tokenizer: Any,
    device: Any,
    progress: Any,
    on_layer: Any,
    *,
    is_calibrated: bool,
) -> None:
    """Raise TypeError or ValueError for an argument of :func:`quantize_model` that is none."""
    if isinstance(model, QuantConfig):
        raise TypeError("quantize_model takes the model first and the config second: quantize_model(model, config).")
    check_model("quantize_model", model)
    check_config("config", config)
    check_tokenizer(tokenizer)
    check_device("device", device)
    check_flag("progress", progress)
    check_callable("on_layer", on_layer, "a LayerResult")
    if on_layer is not None and not is_calibrated:
        raise ValueError(
            "on_layer gets the errors that calibration measures, and there is no calibration=. Give some text, or "
            "leave on_layer out. The model was not changed."
        )
    check_weights_are_here(
        model,
        "quantizing",
        if_offloaded=" A model that does not fit is quantized while it is loaded, with from_pretrained(name, "
        "quantization_config=config).",
        if_sharded="Quantize and save the model in one process, and load the folder sharded.",
    )


def _refuse_lost_targets(calibration: Calibration) -> None:
    """Raise ValueError if ``calibration`` needs the float model, of which a partly quantized one has no outputs.

    Warns where it would have used that without being asked for.
    """
    if calibration.finetune_epochs or calibration.resume_folder is not None or calibration.asymmetric_targets:
        raise ValueError(
            "some layers are quantized already, and block finetuning, asymmetric targets and resume_folder need the "
            "float model; nothing was changed. Load the float model again (finished blocks are taken from "
            "resume_folder), or continue with finetune_epochs=0, asymmetric_targets=False and resume_folder=None."
        )
    if calibration.asymmetric_targets is None:
        logger.warning(
            "some layers are quantized already, so the float model's outputs are not known, and the others are "
            "quantized without asymmetric targets. With the float model and resume_folder= an interrupted run ends "
            "with the same bits."
        )


@contextmanager
def _described(model: nn.Module, *, n_planned: int) -> Iterator[None]:
    """Mark a transformers model as quantized, with the layers that are, even if an error ends the run."""
    n_before = len(quantized_layers(model))
    try:
        yield
    except BaseException:
        if n_done := len(quantized_layers(model)) - n_before:
            logger.warning(
                "quantizing was interrupted: %d of %d layers are quantized, the others are still dense. The model "
                "works, saves and loads in this state; quantize_model with the same config quantizes the rest.",
                n_done,
                n_planned,
            )
        raise
    finally:
        if len(quantized_layers(model)) > n_before:
            attach_quantizers(model)
