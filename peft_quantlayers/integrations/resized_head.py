"""The output head of a model whose vocabulary is resized: transformers would leave a dense one in its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers import QuantizedLinear
from ..layers.changed_rows import with_changed_rows


def resized_head(
    resized: Callable[..., nn.Module], model: Any, head: nn.Module, *args: Any, **kwargs: Any
) -> nn.Module:
    """``_get_resized_lm_head`` of a transformers model: a quantized head stays one, and its rows keep their codes.

    Args:
        resized: transformers' own.
        model: whose head ``head`` is.
        head: as it is.
    """
    dense: Any = resized(head, *args, **kwargs)
    if not isinstance(head, QuantizedLinear) or dense is head:
        return dense
    weight = dense.weight.detach()
    if not head.quantized_weight.has_rows_of_their_own:
        new = QuantizedLinear.from_weight(
            weight, dense.bias, head.spec, layer_name=head.layer_name, compute_dtype=head.compute_dtype
        )
        return new.train(head.training)
    with torch.no_grad():
        quantized = with_changed_rows(head.quantized_weight, head.dequantize(), weight, layer_name=head.layer_name)
    new = type(head)(
        quantized, compute_dtype=head.compute_dtype, layer_name=head.layer_name, dense_type=head.dense_type
    )
    new.register_parameter("bias", dense.bias)
    return new.train(head.training)
