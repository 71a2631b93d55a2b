"""Where a layer is in its model, by its name: how deep, and which module of a block. For tables over both."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A layer's place among layers that repeat.

    Fields:
        stack: name of the list of blocks, such as ``model.layers``; empty for a layer outside of all.
        depth: index of its block in that list; 0 outside.
        module: its name inside the block, with ``*`` for the index of an expert.
    """

    stack: str
    depth: int
    module: str


def place_of(name: str) -> Place:
    """The place of the layer ``name``: the first number in it is its block's."""
    found = re.fullmatch(r"(.*?)\.(\d+)\.(.+)", name)
    if found is None:
        return Place("", 0, name)
    module = ".".join("*" if part.isdigit() else part for part in found[3].split("."))
    return Place(found[1], int(found[2]), module)


@dataclass(frozen=True)
class DepthTable:
    """Numbers of layers over depth and module.

    Fields:
        modules: labels of the rows.
        depths: of the columns.
        values: a row for each module, the mean where several layers share a place, NaN where there is none.
    """

    modules: tuple[str, ...]
    depths: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]


def depth_table(numbers: Mapping[str, float]) -> DepthTable:
    """Arrange ``numbers``, by names of layers, in the order in which modules come first."""
    of_place: dict[tuple[str, str], dict[int, list[float]]] = {}
    for name, number in numbers.items():
        place = place_of(name)
        of_place.setdefault((place.stack, place.module), {}).setdefault(place.depth, []).append(number)
    has_several = len({stack for stack, _ in of_place if stack}) > 1
    labels = tuple(f"{stack}.*.{module}" if stack and has_several else module for stack, module in of_place)
    depths = tuple(sorted({depth for row in of_place.values() for depth in row}))
    values = tuple(
        tuple(sum(row[depth]) / len(row[depth]) if depth in row else math.nan for depth in depths)
        for row in of_place.values()
    )
    return DepthTable(labels, depths, values)
