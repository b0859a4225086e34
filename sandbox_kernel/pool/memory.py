"""This machine's memory, from /proc (proc(5))."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sandbox_kernel.pool.policy import Host

_PROC = Path("/proc")


def look(proc: Path = _PROC) -> Host:
    """This machine's memory."""
    sizes = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
    kib = {name: int(sizes[name].split()[0]) for name in ("MemTotal", "MemAvailable")}
    return Host(kib["MemTotal"] / 1024, kib["MemAvailable"] / 1024, _pressure(proc))


def _pressure(proc: Path) -> float:
    """`some avg10` of the memory's pressure stall information (Linux, Documentation/accounting/psi.rst)."""
    with suppress(OSError, ValueError, StopIteration):
        words = (proc / "pressure" / "memory").read_text().splitlines()[0].split()
        return float(next(word for word in words if word.startswith("avg10=")).removeprefix("avg10="))
    return 0.0
