"""How a whole model is called with a batch: keywords, a decoder's inputs, and which tokens are padding."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..integrations.private_transformers import frame_masks
from .blocks import Call
from .model_facts import is_encoder_decoder, main_input, text_config

# Inputs of a decoder, or what a model makes them of.
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "labels")
IGNORED_LABEL = -100
# Masks of recordings, in models that also read text.
MASKS_OF_FEATURES = ("feature_attention_mask", "input_features_mask", "padding_mask")


def model_calls(model: nn.Module, batches: Sequence[Tensor | Mapping[str, Any]]) -> list[Call]:
    """Calls of the whole model, seen as one block.

    A batch is what the forward takes: a mapping of its keywords, or a tensor, its main input. A decoder that is given
    none gets its own inputs: the labels of the batch, or else its token ids, shifted as the model shifts labels.
    Labels are given to no forward: no loss is computed.

    Raises:
        ValueError: an encoder-decoder's batch without token ids and without anything for the decoder.
    """
    keyword = main_input(model)
    options = _options(model)
    calls = []
    for batch in batches:
        if isinstance(batch, Tensor) and keyword is None:
            calls.append(Call((batch,), options, runs_hooks=True))
            continue
        inputs: dict[str, Any] = {str(keyword): batch} if isinstance(batch, Tensor) else dict(batch)
        if is_encoder_decoder(model):
            inputs = _with_decoder_inputs(model, inputs)
        inputs.pop("labels", None)
        kwargs = {name: _in_dtype_of(model, value) for name, value in inputs.items()}
        calls.append(Call((), {**kwargs, **options}, runs_hooks=True, masks=_padding_masks(model, inputs)))
    return calls


def batch_tensors(batches: Sequence[Tensor | Mapping[str, Any]]) -> list[Tensor]:
    """All tensors of the batches, in an order that depends on nothing else."""
    found: list[Tensor] = []
    for batch in batches:
        values = [batch] if isinstance(batch, Tensor) else [batch[name] for name in sorted(batch)]
        found += [value for value in values if isinstance(value, Tensor)]
    return found


def _options(model: nn.Module) -> dict[str, Any]:
    """Without a cache: a block that runs again would add to it."""
    parameters = inspect.signature(model.forward).parameters
    uses_cache = getattr(text_config(model), "use_cache", None) or getattr(
        getattr(model, "config", None), "use_cache", False
    )
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {"use_cache": False} if "use_cache" in parameters or (uses_cache and takes_any) else {}


def _in_dtype_of(model: nn.Module, value: Any) -> Any:
    """Floating inputs (pixels, sound) in the model's dtype, as a processor's output is cast by hand."""
    dtype = getattr(model, "dtype", None)
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if is_floating and isinstance(dtype, torch.dtype) and dtype.is_floating_point else value


def _padding_masks(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Masks (batch, length) of the tokens of encoder and decoder that are no padding; none where all count.

    Of a recording also those of the frames that the model makes of it.
    """
    names = ["attention_mask", "decoder_attention_mask", *MASKS_OF_FEATURES]
    masks = {name: mask != 0 for name in names if isinstance(mask := inputs.get(name), Tensor) and mask.dim() == 2}
    padded = {name: mask for name, mask in masks.items() if not bool(mask.all())}
    frames = [
        frame_mask
        for name, mask in padded.items()
        if name in MASKS_OF_FEATURES or (name == "attention_mask" and "input_ids" not in inputs)
        for frame_mask in frame_masks(model, mask)
    ]
    return (*padded.values(), *frames)


def _with_decoder_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """``inputs`` with those of the decoder, and its mask where labels or encoder inputs are padded."""
    if any(name in inputs for name in DECODER_INPUTS[:2]):
        return inputs
    ids, mask = inputs.get("labels"), None
    if ids is not None:
        mask = (ids != IGNORED_LABEL).long()
    elif inputs.get("input_ids") is not None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    else:
        raise ValueError(
            f"{type(model).__name__} has a decoder, and the calibration data holds nothing for it, only "
            f"{sorted(inputs)}. Add 'decoder_input_ids' or 'labels' to each batch: the token ids of the text that the "
            "model should give. Nothing was changed."
        )
    inputs["decoder_input_ids"] = _shifted(model, ids)
    if mask is not None and not bool(mask.all()):
        inputs["decoder_attention_mask"] = mask  # an input counts where the label that it is to predict does
    return inputs


def _shifted(model: nn.Module, ids: Tensor) -> Tensor:
    """The decoder's inputs for the labels ``ids``, (batch, length): its start token, and all but the last of them."""
    shift: Any = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    # Without a start token in the config a model's own shift fails, with an error of many kinds.
    with suppress(AttributeError, ValueError, TypeError, IndexError, RuntimeError):
        if shift is not None:
            return shift(labels=ids)
    config: Any = model.config
    start = next(
        (
            token
            for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id")
            if isinstance(token := getattr(config, name, None), int)
        ),
        0,
    )
    first = torch.full_like(ids[:, :1], start)
    pad = getattr(config, "pad_token_id", None)
    rest = ids[:, :-1].masked_fill(ids[:, :-1] == IGNORED_LABEL, pad if isinstance(pad, int) else start)
    return torch.cat([first, rest], dim=1)
