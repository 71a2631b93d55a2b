"""Fused weights of experts as modules while they are still dense, so that calibration sees what each expert reads.

Between two calls of :func:`as_called_stacks` nothing of this is in a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..integrations.private_experts import experts_by_calls, use_quantized_experts
from .expert_types import FusedWeight, find_stack
from .replace_stack import put_dense
from .stack import QuantizedStack, parameter_order, sorted_bmm


class DenseStack(nn.Module):
    """A fused parameter as a module that is called as a :class:`QuantizedStack` is.

    Attributes:
        weight: the parameter itself.
        is_transposed: each weight is (in_features, out_features).
    """

    def __init__(self, weight: nn.Parameter, *, is_transposed: bool, order: Sequence[str]) -> None:
        super().__init__()
        self.weight = weight
        self.is_transposed = is_transposed
        self.parameter_order = tuple(order)

    @property
    def shape(self) -> torch.Size:
        """Of the parameter."""
        return self.weight.shape

    @property
    def in_features(self) -> int:
        """Of each expert."""
        return self.shape[1 if self.is_transposed else 2]

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameter."""
        return self.weight.dtype

    def __len__(self) -> int:
        return len(self.weight)

    def __getitem__(self, index: Any) -> Tensor:
        return self.weight[index]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (torch.bmm, Tensor.bmm) and not kwargs and len(args) == 2:
            return sorted_bmm(*args)
        args = tuple(each.weight if isinstance(each, cls) else each for each in args)
        return func(*args, **(kwargs or {}))

    def forward(self, x: Tensor, counts: Sequence[int], tokens: Tensor | None = None) -> Tensor:
        """As :meth:`QuantizedStack.forward`."""
        parts = zip(x.to(self.dtype).split(list(counts)), self.weight.unbind(0), strict=True)
        products = [part @ each if self.is_transposed else linear(part, each) for part, each in parts if len(part)]
        return torch.cat(products).to(x.dtype)


@contextmanager
def as_called_stacks(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """While this is open, the dense fused weights among ``names`` are modules, and their experts call them.

    Those that are still dense in the end are plain parameters again.
    """
    placed = [found for found in (find_stack(model, name) for name in names) if found is not None]
    for module, entry in placed:
        _put_called(module, entry)
    try:
        with experts_by_calls([module for module, _ in placed]):
            yield
    finally:
        for module, entry in placed:
            stack = getattr(module, entry.parameter)
            if isinstance(stack, DenseStack):
                put_dense(module, entry.parameter, stack.weight)
            elif isinstance(stack, QuantizedStack):
                use_quantized_experts(module)


@contextmanager
def as_parameters(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Inside of :func:`as_called_stacks`: plain parameters again for as long as this is open, to load numbers into."""
    found = [each for each in (find_stack(model, name) for name in names) if each is not None]
    placed = [(module, entry) for module, entry in found if isinstance(getattr(module, entry.parameter), DenseStack)]
    for module, entry in placed:
        put_dense(module, entry.parameter, getattr(module, entry.parameter).weight)
    try:
        yield
    finally:
        for module, entry in placed:
            _put_called(module, entry)


def _put_called(module: nn.Module, entry: FusedWeight) -> None:
    """Put a dense stack in place of the plain parameter ``entry``, if it is one."""
    weight, order = getattr(module, entry.parameter), parameter_order(module)
    if isinstance(weight, nn.Parameter):
        delattr(module, entry.parameter)
        stack = DenseStack(weight, is_transposed=entry.is_transposed, order=order)
        module.add_module(entry.parameter, stack.train(module.training))


def is_called_stack(module: nn.Module) -> bool:
    """Whether a module is called with tokens sorted by expert."""
    return isinstance(module, (DenseStack, QuantizedStack))
