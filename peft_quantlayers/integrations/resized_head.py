"""The output head of a model whose vocabulary is resized: transformers would leave a dense one in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers import QuantizedLinear
from ..layers.changed_rows import with_changed_rows
from ..layers.quantize_weight import quantize_weight


def resized_head(
    resized: Callable[..., nn.Module], model: Any, head: nn.Module, *args: Any, **kwargs: Any
) -> nn.Module:
    """``_get_resized_lm_head`` of a transformers model: a quantized head is resized in its place.

    Its rows keep their codes, and the layer its hooks, ``activation_bits`` and low-rank branch.

    Args:
        resized: transformers' own.
        model: whose head ``head`` is.
        head: as it is.
    """
    dense: Any = resized(head, *args, **kwargs)
    if not isinstance(head, QuantizedLinear) or dense is head:
        return dense
    weight, old = dense.weight.detach(), head.quantized_weight
    with torch.no_grad():
        if old.has_rows_of_their_own:
            new = with_changed_rows(old, head.dequantize(), weight, layer_name=head.layer_name)
        else:
            new = quantize_weight(weight, head.spec, layer_name=head.layer_name)
        head.resize(new)
        if head.bias is not None:
            head.bias.data = dense.bias.detach()
    return head
