"""How far an exported model is from its source, on text: the divergence of the two models' predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from ..layers import QuantizedLinear
from ..layers.expert_types import stack_at
from ..layers.replace import dense_in_place_of
from ..layers.replace_stack import put_dense
from ..layers.selection import quantized_layers

WINDOW = 512


@torch.no_grad()
def kl_of_export(model: Any, weights: Mapping[str, Tensor], token_ids: Tensor, *, window: int = WINDOW) -> float:
    """Mean KL divergence, in nats per token, of ``model`` with ``weights`` in the place of its own from ``model``.

    Args:
        model: a causal language model with quantized layers; it is as before afterwards.
        weights: what readers compute for each layer, (out_features, in_features), float32, by its name in
            the model; of a stack of experts with the expert as first dimension.
        token_ids: (n_tokens,), integer.
        window: tokens that are read at once.

    Raises:
        ValueError: fewer than two tokens.
    """
    if token_ids.numel() < 2:
        raise ValueError("text: two tokens at least are needed to compare predictions.")
    was_training = model.training
    model.eval()
    total, n_tokens = 0.0, 0
    try:
        for ids in token_ids.reshape(-1).split(window):
            expected = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            with _replaced(model, weights):
                found = model(ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            total += kl_div(found, expected, reduction="sum", log_target=True).item()
            n_tokens += len(ids)
    finally:
        model.train(was_training)
    return total / n_tokens


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    layers = {name: layer for name, layer in quantized_layers(model).items() if name in weights}
    try:
        for name, layer in layers.items():
            weight = weights[name] if layer.branch is None else weights[name] + layer.branch.dense()
            weight = weight.to(layer.compute_dtype)
            if isinstance(layer, QuantizedLinear):
                model.set_submodule(name, dense_in_place_of(layer, weight, layer.bias))
                continue
            experts, entry = stack_at(model, name)
            dense = weight.transpose(1, 2).contiguous() if entry.is_transposed else weight
            put_dense(experts, entry.parameter, nn.Parameter(dense, requires_grad=False))
        yield
    finally:
        for name, layer in layers.items():
            if isinstance(layer, QuantizedLinear):
                model.set_submodule(name, layer)
                continue
            experts, entry = stack_at(model, name)
            delattr(experts, entry.parameter)
            experts.add_module(entry.parameter, layer)
