"""Plots as SVG, made by matplotlib, which is imported when the first one is drawn. Knows numbers and labels only."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .depth_table import depth_table, place_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 10.5  # inches
# Text stays text: it can be selected and searched, and the file is small. Equal plots have equal bytes.
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "peft_quantlayers", "font.family": "sans-serif", "font.size": 9}
BANDS = "#4c78a8"
LINES = (("-", 2.6), ("--", 1.8), (":", 1.4))  # style and width


def heat_map(numbers: Mapping[str, float], *, label: str, limits: tuple[float, float] | None = None) -> Figure:
    """``numbers`` by names of layers, over depth and module; a place without a number is left white.

    Args:
        numbers: finite.
        label: what they are, with their unit.
        limits: numbers at the ends of the colors; None for the smallest and the largest.
    """
    table = depth_table(numbers)
    figure = _figure(0.32 * len(table.modules) + 1.1)
    axes = figure.add_subplot()
    low, high = limits or (min(numbers.values()), max(numbers.values()))
    mesh = axes.pcolormesh(
        list(range(len(table.depths))),
        list(range(len(table.modules))),
        _masked(table.values),
        cmap="viridis",
        vmin=low,
        vmax=high if high > low else low + 1e-9,
        edgecolors="white",
        linewidth=0.5,
    )
    axes.set_yticks(range(len(table.modules)), labels=table.modules)
    step = max(1, math.ceil(len(table.depths) / 40))
    shown = range(0, len(table.depths), step)
    axes.set_xticks(shown, labels=[str(table.depths[column]) for column in shown])
    axes.invert_yaxis()
    axes.set_xlabel("block")
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    figure.colorbar(mesh, ax=axes, label=label, pad=0.01, fraction=0.03, aspect=12)
    return figure


def bands(quantiles: Mapping[str, Sequence[float]], *, label: str, is_logarithmic: bool = False) -> Figure:
    """Distributions by names of layers: for each module the median, the middle 90 % and the ends, over depth.

    Args:
        quantiles: of each layer, at :data:`layer_facts.QUANTILES`.
        label: of the numbers.
        is_logarithmic: for positive numbers of several sizes.
    """
    tables = [
        depth_table({name: each[index] for name, each in quantiles.items()})
        for index in range(len(next(iter(quantiles.values()))))
    ]
    modules, depths = tables[0].modules, tables[0].depths
    n_columns = min(4, len(modules))
    n_rows = math.ceil(len(modules) / n_columns)
    figure = _figure(1.7 * n_rows + 0.4)
    grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(modules) :]:
        axes.set_visible(False)
    for row, (axes, module) in enumerate(zip(grid.flat, modules, strict=False)):
        low, lower, median, upper, high = (table.values[row] for table in tables)
        axes.fill_between(depths, low, high, color=BANDS, alpha=0.15, linewidth=0)
        axes.fill_between(depths, lower, upper, color=BANDS, alpha=0.4, linewidth=0)
        axes.plot(depths, median, color=BANDS, linewidth=1.2, marker="." if len(depths) == 1 else "")
        axes.set_title(module, fontsize=8)
        axes.grid(alpha=0.3)
        if is_logarithmic:
            axes.set_yscale("log")
    for axes in grid[:, 0]:
        axes.set_ylabel(label)
    for axes in grid[-1]:
        axes.set_xlabel("block")
    return figure


def curves(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, is_logarithmic: bool = False) -> Figure:
    """Lines over steps: the points (step, number) of each. Lines that lie on each other are told apart."""
    figure = _figure(2.8)
    axes = figure.add_subplot()
    for number, (name, points) in enumerate(series.items()):
        style, width = LINES[number % len(LINES)]
        axes.plot(*zip(*points, strict=True), label=name, linestyle=style, linewidth=width)
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    if is_logarithmic:
        axes.set_yscale("log")
    if len(series) > 1:
        axes.legend(frameon=False)
    return figure


def small_curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """A small plot for each of ``series``, with an axis of its own."""
    n_columns = min(4, len(series))
    n_rows = math.ceil(len(series) / n_columns)
    figure = _figure(1.7 * n_rows + 0.3)
    grid = figure.subplots(n_rows, n_columns, squeeze=False)
    for axes in grid.flat[len(series) :]:
        axes.set_visible(False)
    for axes, (name, points) in zip(grid.flat, series.items(), strict=False):
        steps, numbers = zip(*points, strict=True)
        axes.plot(steps, numbers, color=BANDS, linewidth=1.2)
        axes.set_title(name, fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def svg(figure: Figure) -> str:
    """``figure`` as an ``<svg>`` element to stand in a page."""
    import matplotlib

    written = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(written, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = written.getvalue()
    return text[text.index("<svg") :]


def is_in_blocks(numbers: Mapping[str, Any]) -> bool:
    """Whether some of the layers lie in blocks, so that a plot over depth says something."""
    return any(place_of(name).stack for name in numbers)


def _figure(height: float) -> Figure:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("a report needs matplotlib: pip install 'peft_quantlayers[report]'.") from None
    with matplotlib.rc_context(STYLE):
        return Figure(figsize=(WIDTH, height), layout="constrained")


def _masked(values: Sequence[Sequence[float]]) -> Any:
    import numpy

    return numpy.ma.masked_invalid(numpy.array(values, dtype=float))
