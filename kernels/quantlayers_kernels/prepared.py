"""Products with one weight on a CPU whose arguments were checked once.

For one token through a small layer, checking shapes and dtypes and filling in the kernel's structures takes as long as
multiplying. Here that is done once for a weight; a call looks at its input only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import native
from .interface import MAX_TOGETHER, Products
from .native_product import empty_product, readable


class PreparedProduct:
    """``x @ weight.T + bias`` for few tokens, without gradients; float32 inside, dtype of ``x`` out.

    It knows where the weight's tensors lie, and does not keep them alive: the caller makes a new one once a tensor has
    moved. A copy or a pickle of it is None, since the copied tensors lie elsewhere.
    """

    __slots__ = (
        *("_converted", "_function", "_in_features", "_layout", "_max_numbers", "_out_features", "_together"),
        *("_choice", "_weight"),
    )

    def __init__(
        self,
        kernel: str,
        weight: ctypes.Structure,
        *,
        in_features: int,
        out_features: int,
        max_tokens: int,
        together: str,
        layout: Hashable = None,
        converted: Mapping[str, Tensor] | None = None,
    ) -> None:
        """
        Args:
            kernel: one of ``interface.KERNELS`` that takes a weight and a :class:`.interface.Product`.
            weight: the addresses of its tensors, which are checked and contiguous.
            in_features, out_features: of the weight.
            max_tokens: for more, calls give None.
            together: the kernel that takes :class:`.interface.Products` of several weights.
            layout: what such weights must have in common, besides their kernel and ``in_features``.
            converted: memory that the kernel reads in place of tensors, by their names. They are copied there for
                every call, since a write to them need not be noticed otherwise.
        """
        self._function = getattr(native.library(), kernel)
        self._choice = native.choice()
        self._weight = weight
        self._in_features, self._out_features = in_features, out_features
        self._max_numbers = max_tokens * in_features
        self._together, self._layout = together, layout
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
        shape = x.shape
        if not 0 < x.numel() <= self._max_numbers or not shape or shape[-1] != self._in_features:
            return None
        inputs = readable(x)
        if bias is not None:
            if bias.shape != (self._out_features,):
                return None
            bias = bias.float().contiguous()
        if self._converted is not None:
            self._convert(tensors)
        y, product = empty_product(inputs, bias, self._out_features)
        if self._function(self._weight, product, torch.get_num_threads(), self._choice) != 0:
            native.refuse_without_memory(self._function.__name__)
        return y if inputs.dtype == x.dtype else y.to(x.dtype)

    def _convert(self, tensors: Mapping[str, Any]) -> None:
        """Copy what the kernel reads in place of ``tensors``."""
        for name, memory in (self._converted or {}).items():
            memory.copy_(tensors[name])


class PreparedProducts:
    """The products of one input with several weights, in one call of a kernel: the bits of each alone."""

    __slots__ = ("_converts", "_function", "_kept", "_members", "_rows", "_rows_of_all", "_sizes", "_weights")

    def __init__(self, members: Sequence[PreparedProduct]) -> None:
        """``members``: for which :func:`go_together` is true."""
        self._members = tuple(members)
        self._rows = [each._out_features for each in members]
        self._rows_of_all = sum(self._rows)
        self._function = getattr(native.library(), members[0]._together)
        self._converts = any(each._converted is not None for each in members)
        weights = (type(members[0]._weight) * len(members))(*(each._weight for each in members))
        sizes = (ctypes.c_int64 * len(members))(*self._rows)
        self._weights, self._sizes = ctypes.addressof(weights), ctypes.addressof(sizes)
        self._kept = (weights, sizes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __call__(self, x: Tensor, tensors: Sequence[Mapping[str, Any]]) -> Sequence[Tensor] | None:
        """As :meth:`PreparedProduct.__call__`, with the tensors of each weight by name, and with its "bias".

        The results lie in one piece of memory. The caller keeps the weights' memory alive; what is in it may have
        changed since, and then is what is multiplied.
        """
        members, rows = self._members, self._rows
        first, shape = members[0], x.shape
        if not 0 < x.numel() <= first._max_numbers or not shape or shape[-1] != first._in_features:
            return None
        inputs, addresses, read = readable(x), None, []
        for i, its in enumerate(tensors):
            bias = its["bias"]
            if bias is not None:
                if type(bias) is not nn.Parameter or not bias.is_cpu or bias.shape != (rows[i],):
                    return None
                read.append(bias.float().contiguous())
                addresses = addresses or (ctypes.c_void_p * len(rows))()
                addresses[i] = read[-1].data_ptr()
        if self._converts:
            for member, its in zip(members, tensors, strict=True):
                member._convert(its)
        n_tokens = inputs.numel() // first._in_features
        leading = inputs.shape[:-1]
        if n_tokens == 1:
            y = inputs.new_empty((*leading, self._rows_of_all))
            results: Sequence[Tensor] = y.unsafe_split_with_sizes(rows, -1)
        else:
            y = inputs.new_empty(n_tokens * self._rows_of_all)
            flat = y.unsafe_split_with_sizes([n_tokens * each for each in rows])
            results = [part.view(*leading, each) for part, each in zip(flat, rows, strict=True)]
        call = Products(
            self._weights,
            self._sizes,
            None if addresses is None else ctypes.addressof(addresses),
            y.data_ptr(),
            inputs.data_ptr(),
            len(rows),
            n_tokens,
            native.KINDS[inputs.dtype],
        )
        if self._function(call, torch.get_num_threads(), first._choice) != 0:
            native.refuse_without_memory(self._function.__name__)
        return results if inputs.dtype == x.dtype else [each.to(x.dtype) for each in results]


def go_together(products: Sequence[PreparedProduct]) -> bool:
    """Whether :class:`PreparedProducts` of these can be made: several, but not too many, of one method and layout,
    with inputs of one width."""
    kinds = {(each._together, each._layout, each._in_features, each._max_numbers) for each in products}
    return len(kinds) == 1 < len(products) <= MAX_TOGETHER
