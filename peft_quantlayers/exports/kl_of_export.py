"""How far an exported model is from its source, on text: :func:`..evaluate.divergence` of what readers compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..evaluate import divergence
from ..layers import QuantizedLinear
from ..layers.expert_types import stack_at
from ..layers.quantized_layers import quantized_layers
from ..layers.replace_stack import put_dense

WINDOW = 512


def kl_of_export(model: Any, weights: Mapping[str, Tensor], token_ids: Tensor) -> float:
    """Mean KL divergence, in nats per token, of ``model`` with ``weights`` in the place of its own from ``model``.

    Args:
        model: a causal language model with quantized layers; it is as before afterwards.
        weights: what readers compute for each layer, (out_features, in_features), float32, by its name in the model;
            of a stack of experts with the expert as first dimension.
        token_ids: integers; an incomplete window of ``WINDOW`` tokens at the end of a longer text is not used.

    Raises:
        ValueError: fewer than two tokens.
        TypeError: no integers.
    """
    was_training = model.training
    model.eval()
    try:
        ids = token_ids.reshape(-1)
        window = min(WINDOW, ids.numel())
        return divergence(_Exported(model, weights), model, ids, window=window, progress=False).kl
    finally:
        model.train(was_training)


class _Exported(nn.Module):
    """``model`` with ``weights`` in the place of its own for as long as it is called."""

    def __init__(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model = model
        self.weights = weights

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        with _replaced(self.model, self.weights):
            return self.model(input_ids, **options)


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    layers = {name: layer for name, layer in quantized_layers(model).items() if name in weights}
    try:
        for name, layer in layers.items():
            weight = weights[name] if layer.branch is None else weights[name] + layer.branch.dense()
            weight = weight.to(layer.compute_dtype)
            if isinstance(layer, QuantizedLinear):
                model.set_submodule(name, layer.dense_with(weight, layer.bias))
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
