"""How a crowd of kernels grew: its figures, when it has grown enough, and the table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from bench.figures import Figure, percentile, shown, shown_ratio

LEAST_AVAILABLE = 0.15
"""Part of the machine's RAM that stays available; a crowd that has come there is as large as fits."""
LONGEST_START = 30.0
"""Seconds; a start that takes longer is not what anybody would wait for."""
AROUND = 3
"""Starts whose median is the latency of a start: that of the Nth kernel and the ones just before it."""

_HEADINGS = ("kernels", "start of the last", "unique each", "PSS each", "MemAvailable each", "CPU, all")


@dataclass(frozen=True)
class Point:
    """A crowd of `count` kernels, all of which have run a cell and are idle.

    A single VM has what it reads of the template for itself; from the second one on they have it in common.

    Attributes:
        count: live kernels.
        unique: MiB that no other process maps, all kernels together; see `bench.memory`.
        pss: MiB of all kernels together with their shares of what they map in common with others.
        available: MiB by which the machine's MemAvailable is less than before the first kernel, page tables
            and Linux's other memory included; of use where nothing else goes on.
        cpu: per cent of one core that all of them use together.
    """

    count: int
    unique: float
    pss: float
    available: float
    cpu: float


@dataclass
class Growth:
    """How one crowd grew.

    Attributes:
        label: the kernels' name.
        points: in the order of their counts.
        starts: seconds from each start to the first `kernel_info_reply`, in order.
        traces: seconds by phase of each start, empty for a kernel without a VM.
        trips: seconds of the last `1+1` of every kernel, with the whole crowd alive.
        wrong: a sentence for each kernel that did not answer it correctly.
        failed: the error of the start that was one too many; empty when none failed.
        end: why it did not grow further.
    """

    label: str
    points: list[Point] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    traces: list[dict[str, float]] = field(default_factory=list)
    trips: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: str = ""
    end: str = ""

    def start_of(self, count: int) -> float:
        """Seconds that the start of kernel `count` took: median of it and the ones just before it."""
        return statistics.median(self.starts[max(0, count - AROUND) : count])

    def slower(self, count: int) -> float:
        """How many times the first starts' median the start of kernel `count` takes."""
        return self.start_of(count) / statistics.median(self.starts[:AROUND])

    def document(self) -> dict[str, Any]:
        """All of it for `--json`, with the figures per kernel."""
        points = [
            asdict(point)
            | {f"{name}_each": getattr(point, name) / point.count for name in ("unique", "pss", "available")}
            | {"start": self.start_of(point.count), "slower_than_first": self.slower(point.count)}
            for point in self.points
        ]
        return asdict(self) | {"points": points}


@dataclass(frozen=True)
class AtOnce:
    """Many starts at the same moment.

    Attributes:
        label: the kernels' name.
        wall: seconds until all have given their first `kernel_info_reply`.
        starts: seconds of each.
    """

    label: str
    wall: float
    starts: tuple[float, ...]

    def line(self) -> str:
        """All of it on one line."""
        each = statistics.median(self.starts)
        return (
            f"{len(self.starts)} starts of {self.label} at once: all have answered after "
            f"{_seconds(self.wall)}, each after {_seconds(each)} (median)"
        )


def enough(count: int, most: int, available: float, total: float, last_start: float) -> str:
    """Why a crowd is not to grow further; empty when it is.

    Args:
        count: kernels there are.
        most: as many as are wanted.
        available: MiB of RAM that programs can have.
        total: MiB of RAM.
        last_start: seconds that the last start took.
    """
    if count >= most:
        return f"{most} were wanted"
    if available < total * LEAST_AVAILABLE:
        return f"only {available:.0f} of {total:.0f} MiB of RAM are available"
    if last_start > LONGEST_START:
        return f"start {count} took {last_start:.0f} s"
    return ""


def table(growth: Growth) -> Table:
    """The table of one crowd for a terminal; memory is per kernel."""
    made = Table(title=f"live, idle kernels: {growth.label}", title_justify="left")
    for heading in _HEADINGS:
        made.add_column(heading, justify="right")
    for point in growth.points:
        sizes = [_mib(size / point.count) for size in (point.unique, point.pss, point.available)]
        made.add_row(
            str(point.count), _seconds(growth.start_of(point.count)), *sizes, f"{point.cpu:.0f} % of a core"
        )
    return made


def lines(growth: Growth) -> list[str]:
    """What the table does not say: how a start slows down, the final check, why the growth ended."""
    told = [
        f"{growth.label}: start {point.count} / first start: {shown_ratio(growth.slower(point.count))}"
        for point in growth.points
        if point.count >= 2 * AROUND
    ]
    if growth.trips:
        median, tail = statistics.median(growth.trips), percentile(growth.trips, 99)
        told.append(
            f"{growth.label}: with {len(growth.starts)} alive {len(growth.trips)} have answered 1+1 with 2: "
            f"median {_seconds(median)}, p99 {_seconds(tail)}"
        )
    why = growth.end.removesuffix(".")
    return [*told, f"{growth.label}: no more than {len(growth.starts)}, because {why}."]


def running_median(values: Sequence[float], around: int) -> list[float]:
    """For each of `values` the median of it and up to `around` - 1 before it."""
    return [statistics.median(values[max(0, end - around) : end]) for end in range(1, len(values) + 1)]


def _seconds(value: float) -> str:
    return shown(Figure("s", value, value, value, 1))


def _mib(value: float) -> str:
    return shown(Figure("MiB", value, value, value, 1))
