"""Samples and what is made of them: medians, percentiles, ratios. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """What one measure found in one turn.

    Attributes:
        figure: name of the figure, also its row's heading.
        unit: `s` or `MiB`.
        values: one, or as many as were taken in this turn.
        percentile: of all turns' values together; None for the median of the turns.
    """

    figure: str
    unit: str
    values: tuple[float, ...]
    percentile: float | None = None


@dataclass(frozen=True)
class Figure:
    """A figure of one kernel.

    Attributes:
        unit: `s` or `MiB`.
        value: median or percentile.
        least: smallest of the values behind it.
        most: largest of the values behind it.
        count: how many there were.
    """

    unit: str
    value: float
    least: float
    most: float
    count: int


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of `values` that at least `percent` per cent of them do not exceed (nearest rank).

    Raises:
        ValueError: there are no values, or `percent` is outside 0 to 100.
    """
    if not values or not 0 <= percent <= 100:
        raise ValueError(f"no {percent:g}th percentile of {len(values)} values")
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]


def summarise(samples: Iterable[Sample]) -> dict[str, Figure]:
    """Figures by name, in the order in which they first came, from all samples of one kernel."""
    grouped: dict[str, list[Sample]] = {}
    for sample in samples:
        grouped.setdefault(sample.figure, []).append(sample)
    return {name: _figure(group) for name, group in grouped.items()}


def ratio(figure: Figure | None, yardstick: Figure | None) -> float | None:
    """How many times `yardstick` `figure` is; None where one is missing or the yardstick is nothing."""
    if figure is None or yardstick is None or yardstick.value <= 0:
        return None
    return figure.value / yardstick.value


def rows(kernels: Mapping[str, Mapping[str, Figure]]) -> list[str]:
    """The names of all figures, in the order in which the kernels have them."""
    return list(dict.fromkeys(name for figures in kernels.values() for name in figures))


def shown(figure: Figure | None) -> str:
    """Three significant digits and a unit that suits: `8.12 ms`, `3.05 s`, `74.0 MiB`."""
    if figure is None:
        return "–"
    value, unit = figure.value, figure.unit
    if unit == "s" and value < 0.001:
        value, unit = value * 1e6, "µs"
    elif unit == "s" and value < 1:
        value, unit = value * 1e3, "ms"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} {unit}"


def shown_ratio(value: float | None) -> str:
    """A ratio with two or three digits: `1.04`, `11.5`."""
    return "–" if value is None else f"{value:.{2 if value < 10 else 1}f}"


def _figure(group: Sequence[Sample]) -> Figure:
    values = [value for sample in group for value in sample.values]
    percent = group[0].percentile
    value = statistics.median(values) if percent is None else percentile(values, percent)
    return Figure(group[0].unit, value, min(values), max(values), len(values))
