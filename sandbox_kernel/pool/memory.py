"""Memory: of this machine, and of a VM's processes. From /proc (proc(5))."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sandbox_kernel.pool.policy import Host

_PROC = Path("/proc")
_MOST_PROCESSES = 64


def look(proc: Path = _PROC) -> Host:
    """This machine's memory."""
    sizes = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    kib = {name: int(sizes[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
    return Host(kib["MemTotal"] / 1024, kib["MemAvailable"] / 1024, _pressure(proc))


def of(pid: int, proc: Path = _PROC) -> float:
    """MiB that the process `pid` and all below it have for themselves; 0 when that cannot be seen."""
    total, todo = 0, [pid]
    for process in todo:
        with suppress(OSError, ValueError):
            for line in (proc / str(process) / "smaps_rollup").read_text().splitlines():
                if line.startswith(("Private_Clean:", "Private_Dirty:", "SwapPss:")):
                    total += int(line.split()[1])
            for task in (proc / str(process) / "task").iterdir():
                todo += map(int, (task / "children").read_text().split())
        if len(todo) > _MOST_PROCESSES:
            break
    return total / 1024


def _pressure(proc: Path) -> float:
    """`some avg10` of the memory's pressure stall information (Linux, Documentation/accounting/psi.rst)."""
    with suppress(OSError, ValueError, StopIteration):
        words = (proc / "pressure" / "memory").read_text().splitlines()[0].split()
        return float(next(word for word in words if word.startswith("avg10=")).removeprefix("avg10="))
    return 0.0
