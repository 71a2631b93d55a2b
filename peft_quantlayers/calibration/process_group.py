"""What several processes that walk through one model together do in common: who makes what, in which order.

Each result is made by one process, by the arithmetic of a process that is alone, and given to all. So what they end
with has the same bits, however many they are. How results travel is not here, but in :mod:`..streaming`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class Processes:
    """One process that is alone. With others, :meth:`gathered` is another one, and all call each method alike.

    Attributes:
        rank: the number of this process.
        size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files, and says what is to be said."""
        return self.rank == 0

    def gathered(self, make: Callable[[], T]) -> list[T]:
        """What ``make`` returns in each process, in all of them. What it raises in one is raised in all."""
        return [make()]

    def of_first(self, make: Callable[[], T]) -> T:
        """What ``make`` returns in the first process."""
        return self.of_one(0, make)

    def of_one(self, index: int, make: Callable[[], T]) -> T:
        """What ``make`` returns in the process that makes number ``index`` of :meth:`in_turns`; it runs there only."""
        owner = index % self.size
        found: list[Any] = self.gathered(lambda: make() if self.rank == owner else None)
        return found[owner]

    def in_turns(self, n: int, make: Callable[[int], T]) -> Iterator[T]:
        """``make(0)`` to ``make(n - 1)``, in order; the processes make one each at a time."""
        for first in range(0, n, self.size):
            made: list[Any] = self.gathered(partial(_made, make, first + self.rank, n))[: n - first]
            while made:  # nothing is held once it was given
                yield made.pop(0)

    def own(self, items: Sequence[T]) -> list[T]:
        """Those of ``items`` that this process makes in :meth:`in_turns`."""
        return list(items[self.rank :: self.size])

    def shared_out(self, costs: Sequence[float], make: Callable[[int], T]) -> list[T]:
        """``make(0)`` to ``make(len(costs) - 1)``, so that no process has much more to do than another one."""
        owners = self._owners(costs)

        def own() -> dict[int, T]:
            return {index: make(index) for index, owner in enumerate(owners) if owner == self.rank}

        found = self.gathered(own)
        return [found[owner][index] for index, owner in enumerate(owners)]

    def _owners(self, costs: Sequence[float]) -> list[int]:
        """The largest first, each to the process that has least so far."""
        totals, owners = [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
            owners[index] = totals.index(min(totals))
            totals[owners[index]] += costs[index]
        return owners


def _made(make: Callable[[int], T], index: int, n: int) -> T | None:
    return make(index) if index < n else None


ALONE = Processes()
