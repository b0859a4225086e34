"""Where the seconds of a VM's start go: medians of the phases that the provisioner reports. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table


@dataclass(frozen=True)
class Phase:
    """A phase of the start of one kind of VM.

    Attributes:
        name: what is done when it is over.
        at: seconds from the client's request until then, median of the turns that have it.
        since: seconds from the phase before, between the two medians.
        turns: in how many turns it came.
    """

    name: str
    at: float
    since: float
    turns: int


def summarise(traces: Iterable[Mapping[str, float]]) -> list[Phase]:
    """The phases of all turns in the order in which they are reached.

    Args:
        traces: of each turn, seconds from the request by phase.
    """
    reached: dict[str, list[float]] = {}
    for trace in traces:
        for name, seconds in trace.items():
            reached.setdefault(name, []).append(seconds)
    medians = {name: statistics.median(values) for name, values in reached.items()}
    found: list[Phase] = []
    for name in sorted(medians, key=lambda each: medians[each]):
        before = found[-1].at if found else 0.0
        found.append(Phase(name, medians[name], medians[name] - before, len(reached[name])))
    return found


def table(label: str, phases: Sequence[Phase]) -> Table:
    """The table for a terminal, in milliseconds."""
    made = Table(title=f"start of {label}", title_justify="left")
    made.add_column("phase")
    for heading in ("done after, ms", "of that, ms", "turns"):
        made.add_column(heading, justify="right")
    for phase in phases:
        made.add_row(phase.name, f"{phase.at * 1e3:.1f}", f"{phase.since * 1e3:.1f}", str(phase.turns))
    return made


def document(starts: Mapping[str, Sequence[Phase]]) -> dict[str, list[dict[str, Any]]]:
    """Phases by kernel, for `--json`."""
    return {label: [asdict(phase) for phase in phases] for label, phases in starts.items()}
