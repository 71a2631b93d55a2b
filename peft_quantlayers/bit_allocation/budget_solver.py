"""Choose one option for each layer so that the sum of costs is low and the bytes stay within a budget. Pure maths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """What a layer takes and costs in one form; ``cost`` in nats of KL."""

    n_bytes: int
    cost: float


def allocate(options: Mapping[str, Sequence[Option]], budget: int) -> dict[str, int]:
    """The index of the option of each layer.

    Greedy along the lower convex hull of each layer's options, which is optimal but for the last step, and then every
    step that still fits.

    Args:
        options: for each layer at least one, in any order.
        budget: bytes that all layers together may take.

    Raises:
        ValueError: the smallest options of all layers take more than ``budget``.
    """
    hulls = {name: _hull(each) for name, each in options.items()}
    chosen = dict.fromkeys(hulls, 0)  # places on the hulls
    left = budget - sum(options[name][hull[0]].n_bytes for name, hull in hulls.items())
    if left < 0:
        raise ValueError(f"the smallest choices take {budget - left:,} bytes, and the budget is {budget:,}.")
    steps = [
        (_gain(options[name][before], options[name][after]), place, name)
        for name, hull in hulls.items()
        for place, (before, after) in enumerate(pairwise(hull), start=1)
    ]
    # Along a hull the gain per byte falls, so the steps of one layer come in order.
    for _, place, name in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        before, after = (options[name][hulls[name][at]] for at in (place - 1, place))
        if chosen[name] == place - 1 and after.n_bytes - before.n_bytes <= left:
            chosen[name] = place
            left -= after.n_bytes - before.n_bytes
    return {name: hulls[name][place] for name, place in chosen.items()}


def _gain(before: Option, after: Option) -> float:
    return (before.cost - after.cost) / (after.n_bytes - before.n_bytes)


def _hull(options: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of cost over bytes, from the smallest to the least costly."""
    order = sorted(range(len(options)), key=lambda index: (options[index].n_bytes, options[index].cost))
    hull: list[int] = []
    for index in order:
        if hull and (
            options[index].cost >= options[hull[-1]].cost or options[index].n_bytes == options[hull[-1]].n_bytes
        ):
            continue
        while len(hull) > 1 and _gain(options[hull[-2]], options[hull[-1]]) <= _gain(
            options[hull[-1]], options[index]
        ):
            hull.pop()
        hull.append(index)
    return hull
