"""The guest's cgroups: what keeps the agent alive, answering, and informed while user code misbehaves.

    agent     PID 1. The guest's kernel reclaims its memory last, and it gets the CPU before the others do.
    kernel    the Jupyter kernel and all that runs as its user: memory and processes are limited; when memory
              is used up the whole group dies at once instead of losing a random member.
    programs  what the host runs as root.

Rules: cgroup v2 (Linux, Documentation/admin-guide/cgroup-v2.rst). The CPU is shared between groups, not
between processes: 4,000 busy processes of the kernel count as one against the agent and Linux's threads.
"""

from __future__ import annotations

import os

import system
from settings import Settings

RESERVE = 24 * 1024 * 1024
"""Bytes of the RAM still available after boot that the kernel may not have.

Without them a kernel at its limit makes the whole machine run out of memory, which stalls the agent for
seconds (seen with 256 MiB and a fork bomb).
"""
PIDS = 4096
"""Processes and threads of the kernel until the host has said how many; the host's own default."""
_AGENT_MEMORY = 24 * 1024 * 1024
_pids: dict[str, int] = {}
"""What `limit_pids` has written, by group."""
_HEADROOM = 1024
"""PIDs that are left for the agent and Linux when the kernel has used up its own."""


def protect(settings: Settings) -> None:
    """Makes the groups and moves this process into its own."""
    root = settings.cgroups
    system.write(f"{root}/cgroup.subtree_control", "+memory +pids +cpu")
    for name in ("agent", "kernel", "programs"):
        os.makedirs(f"{root}/{name}", exist_ok=True)
    system.write(f"{root}/agent/memory.min", str(_AGENT_MEMORY))
    system.write(f"{root}/agent/cpu.weight", "10000")
    system.write(f"{root}/agent/cgroup.procs", str(os.getpid()))
    system.write(f"{root}/kernel/memory.oom.group", "1")
    limit_memory(settings, RESERVE)
    limit_pids(settings, PIDS)
    system.write("/proc/self/oom_score_adj", "-1000")
    # Before whatever may be in a hurry (kernel_process.py); not for what the agent starts.
    os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(2))
    system.stay_in_memory()


def limit_memory(settings: Settings, reserve: int) -> None:
    """Gives the kernel what it has and all that is available but `reserve` bytes, half of it in any case."""
    available = number(settings, "memory.current") + _available(system.read("/proc/meminfo"))
    system.write(f"{settings.kernel_cgroup}/memory.max", str(max(available - reserve, available // 2)))


def limit_pids(settings: Settings, count: int) -> None:
    """Lets the kernel have `count` processes and threads, and sees to it that Linux has more than those."""
    if _pids.get(settings.kernel_cgroup) == count:
        return
    for name in ("kernel/pid_max", "kernel/threads-max"):
        if int(system.read(f"/proc/sys/{name}")) < count + _HEADROOM:
            system.write(f"/proc/sys/{name}", str(count + _HEADROOM))
    system.write(f"{settings.kernel_cgroup}/pids.max", str(count))
    _pids[settings.kernel_cgroup] = count


def number(settings: Settings, name: str) -> int:
    """A file of the kernel's cgroup that holds one number; 0 when there is none, or no limit."""
    try:
        return int(system.read(f"{settings.kernel_cgroup}/{name}"))
    except (OSError, ValueError):
        return 0


def cpu_seconds(settings: Settings) -> float:
    """Seconds of CPU that the kernel's cgroup has had (cpu.stat, usage_usec); 0 where nobody counts."""
    try:
        return int(system.read(f"{settings.kernel_cgroup}/cpu.stat").split()[1]) / 1e6
    except (OSError, ValueError, IndexError):
        return 0.0


def _available(meminfo: str) -> int:
    """Bytes that programs can have before Linux runs out of memory (proc_meminfo(5), MemAvailable)."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("/proc/meminfo does not say how much memory is available")


def out_of_memory_kills(settings: Settings) -> int:
    """Processes of the kernel's cgroup that were killed for want of memory (memory.events, oom_kill)."""
    try:
        for line in system.read(f"{settings.kernel_cgroup}/memory.events").splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0
