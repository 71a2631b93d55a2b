"""Products with one weight on a CPU whose arguments were checked once.

For one token through a small layer, checking shapes and dtypes and filling in the kernel's structures takes as long as
multiplying. Here that is done once for a weight; a call looks at its input only.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import native
from .native_product import empty_product, readable


class PreparedProduct:
    """``x @ weight.T + bias`` for few tokens, without gradients; float32 inside, dtype of ``x`` out.

    It knows where the weight's tensors lie, and does not keep them alive: the caller makes a new one once a tensor has
    moved. A copy or a pickle of it is None, since the copied tensors lie elsewhere.
    """

    __slots__ = ("_converted", "_function", "_in_features", "_max_numbers", "_out_features", "_variant", "_weight")

    def __init__(
        self,
        kernel: str,
        weight: ctypes.Structure,
        *,
        in_features: int,
        out_features: int,
        max_tokens: int,
        converted: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Args:
            kernel: one of ``interface.KERNELS`` that takes a weight and a :class:`.interface.Product`.
            weight: the addresses of its tensors, which are checked and contiguous.
            in_features, out_features: of the weight.
            max_tokens: for more, calls give None.
            converted: memory that the kernel reads in place of tensors, by their names. They are copied there for
                every call, since a write to them need not be noticed otherwise.
        """
        self._function = getattr(native.library(), kernel)
        self._variant = native.variant()
        self._weight = weight
        self._in_features, self._out_features = in_features, out_features
        self._max_numbers = max_tokens * in_features
        self._converted = converted

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, x: Tensor, tensors: Mapping[str, Any], bias: Tensor | None) -> Tensor | None:
        """The product, (..., out_features); None for too many tokens, for none, or for other shapes.

        Args:
            x: (..., in_features), one of ``native.KINDS``, a plain tensor on the CPU.
            tensors: of the weight, by name, where they lay when this was made.
            bias: (out_features,), on the CPU, or None.
        """
        shape, n_numbers = x.shape, x.numel()
        if not 0 < n_numbers <= self._max_numbers or not shape or shape[-1] != self._in_features:
            return None
        inputs = readable(x)
        if bias is not None:
            if bias.shape != (self._out_features,):
                return None
            bias = bias.float().contiguous()
        if self._converted is not None:
            for name, memory in self._converted.items():
                memory.copy_(tensors[name])
        y, product = empty_product(inputs, bias, self._out_features)
        if self._function(self._weight, product, torch.get_num_threads(), self._variant) != 0:
            native.refuse_without_memory(self._function.__name__)
        return y if inputs.dtype == x.dtype else y.to(x.dtype)
