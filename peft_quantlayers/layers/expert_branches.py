"""Low-rank branches beside the experts of a stack, for the length of a forward pass.

An adapter on a stack wraps the experts module, not the stack, so it cannot compute its part itself: it says here what
is to be added to each expert's product, and calls the module. It is asked when the stack computes, since a pass that
calibration pauses may find the adapter merged by then. A context variable, so that threads, and passes that are
paused, do not see each other's adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from quantlayers_kernels.frozen_linear import Branch

# The branches of each expert; None for none at all.
Branches = Sequence[Sequence[Branch]] | None

# By the id of the stack.
_active: ContextVar[Mapping[int, Callable[[], Branches]]] = ContextVar("expert_branches")


@contextmanager
def branches_on(stack: nn.Module, branches: Callable[[], Branches]) -> Iterator[None]:
    """While this is open, what ``branches`` gives is added to the products of the experts of ``stack``."""
    token = _active.set({**_active.get({}), id(stack): branches})
    try:
        yield
    finally:
        _active.reset(token)


def branches_of(stack: nn.Module) -> Branches:
    """The branches of each expert of ``stack``; None without any."""
    found = _active.get({}).get(id(stack))
    return None if found is None else found()
