"""The weight of one expert of a quantized stack, as a tensor that products read straight from the codes."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..integrations.private_transformers import mark_as_initialized
from .write_through import QuantizedSource, WriteThroughWeight


class ExpertSource(QuantizedSource, Protocol):
    """One expert of a stack; ``out_features`` and ``in_features`` are the sides as the fused parameter has them."""

    is_transposed: bool

    def product(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...


class ExpertView(WriteThroughWeight):
    """``stack[e]``: the weight of one expert as the fused parameter has it, in the stack's compute dtype.

    ``F.linear(x, view)``, or ``x @ view`` where the parameter is transposed, multiplies from the codes, with the
    gradient of ``x`` and with the adapters on the stack. Anything else reads the dequantized weight, and a write in
    place quantizes that expert again.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            given: list[Any] = [*args, *(None,) * (3 - len(args))]
            x, weight, bias = (kwargs.get(name, given[at]) for at, name in enumerate(("input", "weight", "bias")))
            if _multiplies(x, weight, is_transposed=False):
                return weight._layer.product(x, bias)
        elif func in _MATMULS and len(args) == 2 and not kwargs:
            x, weight = args if func is not Tensor.__rmatmul__ else reversed(args)
            if _multiplies(x, weight, is_transposed=True):
                return weight._layer.product(x)
        return super().__torch_function__(func, types, args, kwargs)


_MATMULS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__)


def _multiplies(x: Any, weight: Any, *, is_transposed: bool) -> bool:
    """Whether ``weight`` is an expert's as it lies in the stack, unread so far, and ``x`` is plain input for it."""
    is_view = isinstance(weight, ExpertView) and weight._dense is None
    is_plain = isinstance(x, Tensor) and not isinstance(x, WriteThroughWeight)
    return is_view and is_plain and cast(ExpertSource, weight._layer).is_transposed == is_transposed


mark_as_initialized(ExpertView)
