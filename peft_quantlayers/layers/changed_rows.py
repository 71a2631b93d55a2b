"""A quantized weight whose rows are changed, added or cut off: those that stay keep their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import QuantizedWeight
from ..methods import get_method
from .quantize_weight import quantize_weight


def with_changed_rows(old: QuantizedWeight, dense: Tensor, weight: Tensor, *, layer_name: str) -> QuantizedWeight:
    """``weight`` (n_rows, in_features), any number of rows, quantized as ``old``, which has rows of their own.

    Rows that are equal to those of ``dense`` in the same place, which is what ``old`` reads as, keep their bits.

    Returns:
        ``old`` itself where nothing changes.

    Raises:
        ValueError: NaN or Inf in a row that changes.
    """
    kept = min(len(weight), old.out_features)
    differs = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
    differs[:kept] = (dense[:kept].to(weight.dtype) != weight[:kept]).any(1)
    changed = differs.nonzero().flatten()
    if len(weight) == old.out_features and not len(changed):
        return old
    new = quantize_weight(weight[changed], old.spec, layer_name=layer_name) if len(changed) else None
    if new is not None and new.spec != old.spec:
        # Rows whose metadata need more than 8 bits: those that stay have theirs as the numbers that they stand for.
        method = get_method(old.spec.method)
        old, new = method.with_plain_metadata(old), method.with_plain_metadata(new)
    return old.with_rows(changed, new, n_rows=len(weight))
