"""Held-out data for ``merge_back``: token ids or batches, as calls of the model and the tokens that it should give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.blocks import Call, evaluating
from ..calibration.forward_batches import forward_batches
from ..calibration.model_calls import IGNORED_LABEL, model_calls
from ..calibration.model_facts import (
    is_encoder_decoder,
    max_length,
    placeholder_ids,
    predicts_next_token,
    vocabulary_size,
)

# Tokens that are scored at a time: three windows of logits are kept.
WINDOW = 256
# Rows of given batches that are scored at a time, for the same reason.
ROWS = 4
# Most tokens that are taken from an iterator.
MAX_TOKENS = 1 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOutBatch:
    """One call of the model, and what it should predict.

    Fields:
        call: of the base model.
        targets: the class that is right at each place of the logits, (...), -100 where none is scored.
    """

    call: Call
    targets: Tensor

    def logits(self, model: nn.Module) -> Tensor:
        """(..., n_classes), at the places of ``targets``."""
        return self.call.run(model).logits


def held_out_batches(model: nn.Module, evaluate_on: Any) -> list[HeldOutBatch]:
    """``evaluate_on`` as batches; the model is run on the first of them, and not changed.

    Args:
        model: the base model, adapters inside.
        evaluate_on: token ids of one text, or batches of the forward's keywords, with labels unless they are text.

    Raises:
        TypeError: neither of them, or ids for a model that does not predict the next token.
        ValueError: ids beyond the vocabulary, too few of them, no labels, or logits of another shape.
    """
    batches, data = forward_batches(evaluate_on, model, n_tokens=MAX_TOKENS, batch_size=ROWS)
    if batches is None:
        data = evaluate_on if isinstance(evaluate_on, (Mapping, Tensor)) else data
        found = _windows(model, _checked_ids(model, data))
    else:
        calls = model_calls(model, batches)
        found = [
            HeldOutBatch(call=call, targets=_targets(model, batch, call))
            for batch, call in zip(batches, calls, strict=True)
        ]
    _check_logits(model, found[0])
    return found


def _checked_ids(model: nn.Module, evaluate_on: Any) -> Tensor:
    """``evaluate_on`` as a vector of token ids of the model's vocabulary."""
    is_encoding = isinstance(evaluate_on, Mapping) and "input_ids" in evaluate_on
    try:
        ids = torch.as_tensor(evaluate_on["input_ids"] if is_encoding else evaluate_on)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"evaluate_on must be token ids, a vector or a list of integers, got {type(evaluate_on).__name__}. Encode "
            "text with the model's tokenizer. The model is left as it was."
        ) from None
    if ids.numel() and (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool):
        raise TypeError(f"evaluate_on must be integer token ids, got {ids.dtype}. The model is left as it was.")
    ids = ids[0] if ids.dim() == 2 and len(ids) == 1 else ids
    if ids.dim() != 1 or len(ids) < 2:
        raise ValueError(
            f"evaluate_on of shape {tuple(ids.shape)} must be one text of at least 2 token ids, (n_tokens,). Join "
            "several texts into one vector. The model is left as it was."
        )
    kind, vocabulary = type(model).__name__, vocabulary_size(model)
    if vocabulary is None:
        raise TypeError(
            f"evaluate_on compares the predictions of language models, and {kind} has no vocabulary in its config. "
            "Use metric= for other models, or batches with labels. The model is left as it was."
        )
    if not predicts_next_token(model):
        raise TypeError(
            f"evaluate_on=token ids is for models that predict the next token, and {kind} does not. Give batches "
            'with what it reads and should give, evaluate_on=[{"input_ids": ..., "labels": ...}], or use metric=. '
            "The model is left as it was."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"evaluate_on holds token ids from {low} to {high}, but the model's vocabulary has {vocabulary}. Use the "
            "model's own tokenizer. The model is left as it was."
        )
    return ids.long()


def _windows(model: nn.Module, ids: Tensor) -> list[HeldOutBatch]:
    """Windows of one text; an incomplete last one is not used."""
    length = min(WINDOW, len(ids), max_length(model))
    windows = ids[: len(ids) // length * length].view(-1, 1, length)
    calls = model_calls(model, list(windows))
    return [
        HeldOutBatch(call=call, targets=_shifted_left(window)) for call, window in zip(calls, windows, strict=True)
    ]


def _targets(model: nn.Module, batch: Mapping[str, Any], call: Call) -> Tensor:
    if (labels := batch.get("labels")) is not None:
        return _shifted_left(labels) if predicts_next_token(model) else labels
    name = "decoder_input_ids" if is_encoder_decoder(model) else "input_ids"
    ids, mask = batch.get(name), call.kwargs.get(name.replace("input_ids", "attention_mask"))
    if not isinstance(ids, Tensor) or not (predicts_next_token(model) or is_encoder_decoder(model)):
        raise ValueError(
            f"evaluate_on has no labels, which say what {type(model).__name__} should give: add 'labels' to each "
            "batch, or use metric=. The model is left as it was."
        )
    if isinstance(mask, Tensor):
        ids = ids.masked_fill(mask == 0, IGNORED_LABEL)
    for token in placeholder_ids(model):  # which are not predicted
        ids = ids.masked_fill(ids == token, IGNORED_LABEL)
    return _shifted_left(ids)


def _shifted_left(ids: Tensor) -> Tensor:
    """(batch, length): of each token the one that follows it."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED_LABEL)], dim=1)


@torch.no_grad()
def _check_logits(model: nn.Module, batch: HeldOutBatch) -> None:
    """Run the model once, before anything is changed."""
    kind = type(model).__name__
    try:
        with evaluating(model):
            logits = batch.logits(model)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError, KeyError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{kind} does not give logits for evaluate_on: {reason}. Use metric= instead. The model is left as it was."
        ) from error
    if not isinstance(logits, Tensor) or logits.shape[:-1] != batch.targets.shape:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{kind} gives logits of shape {shape} for labels of shape {tuple(batch.targets.shape)}, which cannot be "
            "compared place by place. Use metric= instead. The model is left as it was."
        )
