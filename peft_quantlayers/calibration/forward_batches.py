"""Batches that are ready for a model's forward: mappings of its keywords, one by one or from a DataLoader."""

from __future__ import annotations

import difflib
import inspect
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .model_facts import max_length, placeholder_ids, predicts_next_token
from .texts import one_split

# What a tokenizer and a collator give beside the ids; without padding the ids say all.
BESIDE_IDS = {"input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "position_ids", "labels"}
# What an image or a recording counts for where an iterator is read until it has given n_tokens.
TOKENS_OF_FEATURES = 256
# A keyword that is spelled nearly like one of the forward is a mistake, though most forwards take any keyword.
NEARLY = 0.92


def forward_batches(
    data: Any, model: nn.Module, *, n_tokens: int, batch_size: int
) -> tuple[list[dict[str, Any]] | None, Any]:
    """The batches that ``data`` is, or None and the data that has to be made into batches.

    A batch is a mapping with a tensor of two dimensions or more. Text alone, without padding, is given back as token
    ids for a model that predicts the next token: it is cut into windows like any text.

    Args:
        data: as :class:`Calibration` describes it.
        model: whose forward takes the batches.
        n_tokens: an iterator is read until it has given so many; a list of batches is used as a whole.
        batch_size: larger batches are split, if all of their tensors have one row for each sequence.

    Raises:
        TypeError: tuples instead of mappings, or batches mixed with something else.
        ValueError: a keyword that the forward does not take, NaN or Inf, or sequences that are too long.
    """
    data = one_split(data)
    items: Sequence[Any]
    if isinstance(data, Mapping):
        items = [data]
    elif isinstance(data, (list, tuple)):
        items = data
    elif _is_iterator(data):
        items, data = _taken(data, n_tokens)
    else:
        return None, data
    n_batches = sum(_is_batch(item) for item in items)
    if not n_batches:
        return None, data
    if n_batches < len(items):
        kinds = sorted({type(item).__name__ for item in items})
        raise TypeError(
            f"calibration batches must all be mappings of the forward's keywords to tensors with a batch dimension, "
            f"got a list with {kinds}, of which {n_batches} of {len(items)} are."
        )
    batches = [_as_tensors(item) for item in items]
    if all(_is_plain_text(batch, model) for batch in batches):
        return None, [row for batch in batches for row in batch["input_ids"]]
    for batch in batches:
        _check(batch, model)
    return [part for batch in batches for part in _split(batch, batch_size, placeholder_ids(model))], None


def _is_iterator(data: Any) -> bool:
    """A DataLoader, a generator or a streamed dataset: something that is read once, from its beginning."""
    known = isinstance(data, (str, bytes, set, frozenset, Tensor)) or hasattr(data, "__array__")
    is_table = hasattr(data, "columns") or (getattr(data, "column_names", None) and hasattr(data, "__getitem__"))
    return isinstance(data, Iterable) and not known and not is_table


def _taken(data: Iterable[Any], n_tokens: int) -> tuple[list[Any], Any]:
    """Batches from an iterator until they hold ``n_tokens``; none, and all of the data, where it gives no batches."""
    iterator = iter(data)
    first = next(iterator, None)
    whole = itertools.chain([] if first is None else [first], iterator)
    if isinstance(first, (list, tuple)) and first and isinstance(first[0], Tensor) and first[0].dim() > 1:
        raise TypeError(
            f"a batch of the calibration data is a {type(first).__name__} of {len(first)} parts. Give mappings of the "
            "forward's keywords, for example {'pixel_values': images}: a DataLoader's collate_fn makes them."
        )
    is_floating = isinstance(first, Tensor) and first.is_floating_point()
    if not _is_batch(first) and not is_floating:
        return [], whole
    found, n_found = [], 0
    for item in whole:
        found.append(item)
        n_found += _n_tokens(item)
        if n_found >= n_tokens:
            break
    return found, found


def _is_batch(item: Any) -> bool:
    return isinstance(item, Mapping) and any(getattr(value, "ndim", 0) >= 2 for value in item.values())


def _as_tensors(item: Mapping[str, Any]) -> dict[str, Any]:
    is_array = {name: hasattr(value, "__array__") for name, value in item.items()}
    return {str(name): torch.as_tensor(value) if is_array[name] else value for name, value in item.items()}


def _n_tokens(item: Any) -> int:
    """Tokens of a batch; an estimate where it holds other inputs than token ids."""
    if not isinstance(item, Mapping):
        return TOKENS_OF_FEATURES * len(item)
    if "input_ids" in item:
        counted = item.get("attention_mask")
        return int(torch.as_tensor(item["input_ids"]).numel() if counted is None else torch.as_tensor(counted).sum())
    return TOKENS_OF_FEATURES * max((len(value) for value in item.values() if getattr(value, "ndim", 0)), default=1)


def _is_plain_text(batch: Mapping[str, Any], model: nn.Module) -> bool:
    mask = batch.get("attention_mask")
    is_padded = isinstance(mask, Tensor) and not bool(mask.all())
    return "input_ids" in batch and set(batch) <= BESIDE_IDS and not is_padded and predicts_next_token(model)


def _check(batch: Mapping[str, Any], model: nn.Module) -> None:
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{name} of the calibration data holds NaN or Inf.")
        if name in parameters:
            continue
        missing = [known for known in parameters if known not in batch]
        meant = difflib.get_close_matches(name, missing, n=1, cutoff=NEARLY if takes_any else 0.5)
        if meant or not takes_any:
            raise ValueError(
                f"the calibration data has the entry {name!r}, which {type(model).__name__}.forward does not take"
                + (f" (did you mean {meant[0]!r}?)" if meant else "")
                + f"; it takes {[known for known in parameters if known not in ('args', 'kwargs')]}."
            )
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() == 2 and set(batch) <= BESIDE_IDS and ids.shape[1] > max_length(model):
        raise ValueError(
            f"the calibration data has sequences of {ids.shape[1]} tokens, and the model has positions for "
            f"{max_length(model)}. Shorten them: tokenizer(..., truncation=True, max_length={max_length(model)})."
        )


def _split(batch: dict[str, Any], batch_size: int, placeholders: Sequence[int]) -> list[dict[str, Any]]:
    """Parts of at most ``batch_size`` rows; the batch itself if its tensors have not all a row for each sequence."""
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.dim() > 1 and set(batch) - BESIDE_IDS:
        # As many images as sequences, and yet not one for each.
        counts = [(ids == placeholder).flatten(1).sum(1) for placeholder in placeholders]
        if any(len(count.unique()) > 1 for count in counts):
            return [batch]
    sizes = {len(value) if value.dim() else None for value in batch.values() if isinstance(value, Tensor)}
    # Image patches of several sizes lie in one dimension, and do not say which sequence they belong to.
    if len(sizes) != 1 or None in sizes or max(filter(None, sizes), default=0) <= batch_size:
        return [batch]
    n_rows = max(filter(None, sizes))
    if any(isinstance(value, (list, tuple)) for value in batch.values()):
        return [batch]
    return [
        {
            name: value[start : start + batch_size] if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        for start in range(0, n_rows, batch_size)
    ]
