"""A language model as a function of tensors alone, its cache included: what a tracer follows. Imports no converter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

# Of the tokens that are traced with: none of them is 1, which a tracer could take for a size that fits any other.
_BATCH, _NEW, _PAST = 2, 3, 4


class TracedDecoder(nn.Module):
    """``model`` with its past keys and values as arguments and results.

    A layer with a sliding window keeps all of them, and its mask leaves out the old ones.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, beam_idx: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        """
        Args:
            input_ids: (batch, n_new), integer.
            attention_mask: (batch, n_past + n_new), integer; 0 for padding.
            position_ids: shaped like ``input_ids``.
            beam_idx: (batch,), integer: the row of the past that each row goes on from.
            past: keys and values of each layer in turn, (batch, heads, n_past, head_dim).

        Returns:
            Logits, (batch, n_new, vocabulary); and keys and values with the new ones at the end.
        """
        cache = DynamicCache()
        for keys, values in zip(past[::2], past[1::2], strict=True):
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys.index_select(0, beam_idx), values.index_select(0, beam_idx)
            cache.layers.append(layer)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return (found.logits, *_parts(cache))


def example_inputs(model: Any) -> tuple[Tensor, ...]:
    """Arguments of a :class:`TracedDecoder` of ``model``, on which all sizes differ."""
    shapes = [(_BATCH, *shape) for shape in cache_shapes(model)]
    return (
        torch.ones(_BATCH, _NEW, dtype=torch.int64),
        torch.ones(_BATCH, _PAST + _NEW, dtype=torch.int64),
        torch.arange(_PAST, _PAST + _NEW).repeat(_BATCH, 1),
        torch.arange(_BATCH),
        *(torch.zeros(batch, heads, _PAST, size) for batch, heads, size in shapes),
    )


@torch.no_grad()
def cache_shapes(model: Any) -> list[tuple[int, int]]:
    """Heads and their size of keys and values of each layer in turn, as the model itself makes them.

    Raises:
        ValueError: its cache holds something else than keys and values.
    """
    cache = DynamicCache()
    model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache, use_cache=True)
    parts = _parts(cache)
    if len(cache.layers) != model.config.get_text_config().num_hidden_layers:
        raise ValueError("its cache does not have keys and values of every layer")
    return [(part.shape[1], part.shape[3]) for part in parts]


def _parts(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of each layer in turn."""
    parts = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    if not all(isinstance(part, Tensor) and part.dim() == 4 for part in parts):
        raise ValueError("its cache holds something else than keys and values")
    return parts  # type: ignore[return-value]
