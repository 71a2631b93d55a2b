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
from functools import cached_property

from torch import nn

from quantlayers_kernels.branch_products import Branch


class ExpertBranches:
    """The branches beside all experts of a stack.

    Attributes:
        of_all: each with ``A`` (n_experts, r, in_features) and ``B`` (n_experts, out_features, r).
    """

    def __init__(self, of_all: Sequence[Branch]) -> None:
        self.of_all = of_all

    @cached_property
    def of_each(self) -> list[list[Branch]]:
        """The branches of each expert, differentiable in the factors of all."""
        # unbind, and no index: the gradient of each index would be as large as all experts' factors.
        parts = [zip(each.A.unbind(0), each.B.unbind(0), strict=True) for each in self.of_all]
        return [
            [Branch(A, B, each.scaling, each.dropout) for each, (A, B) in zip(self.of_all, factors, strict=True)]
            for factors in zip(*parts, strict=True)
        ]


# What gives the branches beside a stack, None for none; by the id of the stack.
_active: ContextVar[Mapping[int, Callable[[], ExpertBranches | None]]] = ContextVar("expert_branches")


@contextmanager
def branches_on(stack: nn.Module, branches: Callable[[], ExpertBranches | None]) -> Iterator[None]:
    """While this is open, what ``branches`` gives is added to the products of the experts of ``stack``."""
    token = _active.set({**_active.get({}), id(stack): branches})
    try:
        yield
    finally:
        _active.reset(token)


def branches_of(stack: nn.Module) -> ExpertBranches | None:
    """The branches beside the experts of ``stack``; None without any."""
    found = _active.get({}).get(id(stack))
    return None if found is None else found()
