"""What a VM's processes take of the host, from /proc (proc(5))."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_MOST_PROCESSES = 64
_KIB = 1024


@dataclass(frozen=True)
class Footprint:
    """What one process has taken.

    Attributes:
        cpu: seconds of CPU.
        memory: bytes that it has for itself.
        peak: bytes; the most it had in RAM, what it shares with others (a template) included.
    """

    cpu: float
    memory: int
    peak: int


def of_process(pid: int, proc: Path = _PROC) -> Footprint:
    """The footprint of `pid`; zeros for what cannot be seen."""
    cpu = peak = 0.0
    with suppress(OSError, ValueError, IndexError):
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
        cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    with suppress(OSError, ValueError, StopIteration):
        lines = (proc / str(pid) / "status").read_text().splitlines()
        peak = int(next(line for line in lines if line.startswith("VmHWM:")).split()[1]) * _KIB
    return Footprint(cpu, _private(pid, proc) * _KIB, int(peak))


def of_tree(pid: int, proc: Path = _PROC) -> float:
    """MiB that the process `pid` and all below it have for themselves; 0 when that cannot be seen."""
    total, todo = 0, [pid]
    for process in todo:
        total += _private(process, proc)
        with suppress(OSError, ValueError):
            for task in (proc / str(process) / "task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        if len(todo) > _MOST_PROCESSES:
            break
    return total / 1024


def _private(pid: int, proc: Path) -> int:
    """KiB that a process has for itself."""
    total = 0
    with suppress(OSError, ValueError):
        for line in (proc / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:", "SwapPss:")):
                total += int(line.split()[1])
    return total
