"""The growth of a crowd as a picture: memory against live kernels, and the start of the Nth kernel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes

from bench.growth import Growth, running_median

COLOURS = ("#8a8f98", "#2f81f7", "#d9822b", "#3fa45b")
"""The yardstick's first; each has contrast enough on white and on a dark page."""
_TEXT = "#7d8590"
_SIZE = (8.0, 3.2)
_DPI = 130
_AROUND = 5
_MIB_PER_GIB = 1024

Line = tuple[list[float], list[float]]


def memory_line(growth: Growth) -> Line:
    """Live kernels, and GiB that all of them have for themselves."""
    points = [(0.0, 0.0), *((float(point.count), point.unique / _MIB_PER_GIB) for point in growth.points)]
    return [count for count, _ in points], [size for _, size in points]


def start_line(growth: Growth) -> Line:
    """The number of each start, and its seconds, smoothed by a running median."""
    return [float(n) for n in range(1, len(growth.starts) + 1)], running_median(growth.starts, _AROUND)


def draw(grown: Sequence[Growth], file: Path) -> None:
    """Writes the picture; its kind is the file's ending."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=_SIZE, layout="constrained")
    for growth, colour in zip(grown, COLOURS, strict=False):
        counts, sizes = memory_line(growth)
        left.plot(counts, sizes, color=colour, marker="o", markersize=4, label=growth.label)
        numbers, seconds = start_line(growth)
        right.plot(numbers, growth.starts, ".", color=colour, markersize=3, alpha=0.5)
        right.plot(numbers, seconds, color=colour)
    _finish(left, "memory of all kernels, GiB (unique)", "live kernels")
    _finish(right, "start to first reply, s (running median)", "number of the start")
    left.legend(loc="upper left", frameon=False, labelcolor=_TEXT, fontsize=9)
    figure.savefig(file, dpi=_DPI, transparent=True)
    pyplot.close(figure)


def _finish(axes: Axes, title: str, below: str) -> None:
    axes.set_title(title, loc="left", color=_TEXT, fontsize=10)
    axes.set_xlabel(below, color=_TEXT)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(colors=_TEXT)
    axes.grid(axis="y", color=_TEXT, alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(_TEXT)
