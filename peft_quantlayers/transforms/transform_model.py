"""The call that users make: transforms of a model in memory, checked first, and noted in its config."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..arguments import check_device, check_flag, check_model, check_tokenizer
from ..calibration import Calibration
from ..calibration.blocks import Call
from ..calibration.model_calls import model_calls
from ..calibration.model_facts import takes_token_ids, vocabulary_size
from ..layers.other_quantizers import refuse_other_quantizers
from ..layers.placement import check_weights_are_here
from ..layers.quantized_layers import quantized_layers
from ..layers.selection import checked_modules
from ..methods import QuantConfig
from ..methods.quant_config import check_config
from .applied_transforms import add_record
from .scale_trials import distance, norm, outputs_of
from .transform_base import Surroundings, Transform

logger = logging.getLogger(__name__)

# Tokens of a sequence on which changes are tried.
TRIAL_TOKENS = 32
# By how much rounding of the changed weights may change the outputs, in units of the coarsest weight's precision; norm
# layers compute in float32 at most.
ROUNDINGS = 256


def transform_model(
    model: nn.Module,
    transforms: Transform | Sequence[Transform],
    *,
    config: QuantConfig | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> nn.Module:
    """Change the weights of the float ``model`` so that it quantizes better; return it.

    It computes what it did, but for rounding in the dtype of its weights, and stays an ordinary model of its class.
    What was done is noted in ``model.config``, and so in everything that is saved of it.

    Args:
        model: not quantized, without adapters.
        transforms: one, or several to be done in this order: :class:`AWQScales`,
            :class:`Permutation`, :class:`Rotation`, :class:`SmoothQuant`.
        config: what the model will be quantized to; AWQScales needs it.
        calibration: as for :func:`quantize_model`; for transforms that measure inputs.
        tokenizer: for texts, unless ``calibration`` is a :class:`Calibration`.
        device: where statistics are computed; None for where each weight is.
        progress: show progress bars.

    Raises:
        TypeError: arguments of other kinds.
        ValueError: the model is quantized, sharded, offloaded, or has no place for a transform; a transform lacks
            calibration data or a config. The model was not changed, but for transforms that came before.
        RuntimeError: the outputs changed by more than rounding; the weights must be loaded again.
    """
    chosen = checked_transforms(transforms)
    check_model("transform_model", model)
    check_tokenizer(tokenizer)
    check_device("device", device)
    check_flag("progress", progress)
    if config is not None:
        check_config("config", config)
    _check_float(model)
    given = None if calibration is None else Calibration.of(calibration, tokenizer)
    for transform in chosen:
        if transform.needs_calibration and given is None:
            raise ValueError(
                f"{type(transform).__name__} measures inputs: give calibration=. The model was not changed."
            )
        if transform.needs_config and config is None:
            raise ValueError(
                f"{type(transform).__name__} has to know what the layers will be quantized to: give config=. The "
                "model was not changed."
            )
    surroundings = Surroundings(
        call=_small_call(model, given),
        specs=None if config is None else checked_modules(model, config),
        calibration=given,
        device=device,
        progress=progress,
    )
    for transform in chosen:
        _apply(model, transform, surroundings)
    return model


def checked_transforms(transforms: Any) -> list[Transform]:
    """As a list; TypeError for what is no transform, or no transform at all."""
    chosen = [transforms] if isinstance(transforms, Transform) else transforms
    if not isinstance(chosen, (list, tuple)) or not chosen or not all(isinstance(each, Transform) for each in chosen):
        raise TypeError(f"transforms must be a list such as [AWQScales(), Rotation()], got {transforms!r}.")
    return list(chosen)


def _apply(model: nn.Module, transform: Transform, surroundings: Surroundings) -> None:
    before = outputs_of(model, surroundings.call)
    transform.apply(model, surroundings)
    add_record(model, transform.to_dict())
    change = distance(outputs_of(model, surroundings.call), before) / max(norm(before), 1e-30)
    dtypes = {each.dtype for each in model.parameters() if each.is_floating_point()} | {torch.float32}
    precision = max(torch.finfo(dtype).eps for dtype in dtypes)
    logger.info("%s: outputs changed by %.2g of their size", transform, change)
    if transform.is_exact and not change <= ROUNDINGS * precision:
        raise RuntimeError(
            f"{type(model).__name__} gives other outputs after {transform} (by {change:.2g} of their size): it has a "
            "part that the trials did not show. Load the model again, and leave this transform out."
        )


def _check_float(model: nn.Module) -> None:
    """Raise ValueError unless the weights of ``model`` are here, float, and nothing lies on them."""
    if any(hasattr(module, "get_base_layer") for module in model.modules()):
        raise ValueError(
            "the model carries PEFT adapters, which would no longer fit its weights. Transform the model first, and "
            "add adapters then. The model was not changed."
        )
    refuse_other_quantizers(model)
    if quantized_layers(model):
        raise ValueError(
            "the model is quantized already, if only in part, and a transform needs the float weights. Load the float "
            "model, and give quantize_model(model, config, transforms=[...]); a run that was interrupted after its "
            "transforms goes on without transforms=. The model was not changed."
        )
    check_weights_are_here(
        model,
        "a transform",
        if_offloaded=" Load the model into memory to transform it.",
        if_sharded="Transform and save the model in one process, and load the folder sharded.",
    )


def _small_call(model: nn.Module, calibration: Calibration | None) -> Call:
    """A call with a few tokens: of the data, or of ids at random for a model that reads such."""
    if calibration is not None:
        few = dataclasses.replace(calibration, n_tokens=128, sequence_length=TRIAL_TOKENS, batch_size=1)
        return model_calls(model, few.batches(model)[:1])[0]
    vocabulary = vocabulary_size(model)
    if not takes_token_ids(model) or vocabulary is None:
        raise ValueError(
            f"{type(model).__name__} reads no token ids: give calibration= with batches for its forward, on which the "
            "transform is tried. The model was not changed."
        )
    ids = torch.randint(0, vocabulary, (1, TRIAL_TOKENS), generator=torch.Generator().manual_seed(0))
    return model_calls(model, [ids])[0]
