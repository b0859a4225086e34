"""When each phase of a start was reached: for `--trace`, for a VM's log, for the benchmark."""

from __future__ import annotations

import time


class Trace:
    """Phases by name, each with the seconds from the beginning until it was done, in order."""

    def __init__(self, began: float | None = None) -> None:
        """Begins at `began`, a reading of `time.monotonic` in any process of this host; now when None."""
        self._began = time.monotonic() if began is None else began
        self.phases: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """Notes that `phase` is done now; one that comes again counts from its last time."""
        self.phases.pop(phase, None)
        self.phases[phase] = round(time.monotonic() - self._began, 4)

    def restart(self, began: float) -> None:
        """Begins anew at `began`, with no phase done."""
        self._began = began
        self.phases = {}

    def line(self) -> str:
        """All of it on one line: `QEMU started 0.061 s · QEMU answered 0.108 s`."""
        return summary(self.phases)


def summary(phases: dict[str, float]) -> str:
    """Phases on one line, for a log: `QEMU started 0.061 s · QEMU answered 0.108 s`."""
    return " · ".join(f"{phase} {seconds:.3f} s" for phase, seconds in phases.items())


def lines(phases: dict[str, float]) -> list[str]:
    """Phases, each on a line of its own: seconds until it was done, and since the one before."""
    made, before = [], 0.0
    for phase, seconds in phases.items():
        made.append(f"{seconds:9.4f} s  {seconds - before:+9.4f} s  {phase}")
        before = seconds
    return made
