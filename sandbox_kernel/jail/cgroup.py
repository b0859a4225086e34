"""The host's cgroup around a VM: a bound on what QEMU itself may take beyond the guest's RAM, and on its CPU.

Where it can be had: a delegated cgroup v2 subtree, as every unit of a user's systemd is in, or writable v1
controllers. What cannot be had is in `Cgroup.missing`, controller by controller, for the caller to tell: the
guest's RAM and its processors are bounded by the VM anyway.

A group's folders are removed by the guardian (`guardian.py`), which outlives whoever made them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "sandbox-kernel-"
OVERHEAD = 384
"""MiB that QEMU may use beside the guest's RAM: code, translation cache, buffers (profiled: 60 to 210)."""
PROCESSES = 64
"""Threads of QEMU and bubblewrap: vCPUs, I/O workers, the main loops."""
_PERIOD = 100_000
"""Microseconds in which a quota of CPU is shared out, Linux' default (admin-guide/cgroup-v2.rst, cpu.max)."""


@dataclass(frozen=True)
class Bounds:
    """What a group may have.

    Attributes:
        memory: the guest's RAM in MiB.
        vcpus: the guest's virtual CPUs.
        cpus: CPUs of the host, or parts of one; 0: any number.
    """

    memory: int
    vcpus: int
    cpus: float = 0.0

    @property
    def bytes(self) -> int:
        """Bytes of memory, QEMU's own among them."""
        return (self.memory + OVERHEAD) << 20

    @property
    def tasks(self) -> int:
        """Processes and threads."""
        return PROCESSES + 4 * self.vcpus

    @property
    def quota(self) -> int:
        """Microseconds of CPU in each `_PERIOD`."""
        return max(1000, round(self.cpus * _PERIOD))

    @property
    def controllers(self) -> tuple[str, ...]:
        """The controllers that enforce this."""
        return ("memory", "pids", "cpu") if self.cpus else ("memory", "pids")


@dataclass(frozen=True)
class Cgroup:
    """One VM's cgroup, as the folders that make it up.

    Attributes:
        folders: one folder under v2, one per controller under v1, none where no cgroup is to be had.
        missing: the controllers that were wanted and cannot be had, each with the reason.
    """

    folders: tuple[Path, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    def join(self) -> bool:
        """Moves the calling thread into the group, so that its future children are born there.

        Only cgroup v1 has groups of single threads (admin-guide/cgroup-v1/cgroups.rst, `tasks`). To move a
        process (`add`) Linux has all others wait, for 4 to 9 ms a controller; a thread moves itself at once.

        Returns:
            Whether it is there; False under v2, or where there is no group.
        """
        files = [folder / "tasks" for folder in self.folders]
        if not files or not all(file.exists() for file in files):
            return False
        for file in files:
            file.write_text("0")
        return True

    def add(self, pid: int) -> None:
        """Moves a process into the group; its future children are born there.

        Raises:
            OSError: the kernel refused; the process is not bounded.
        """
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(pid))

    def cpu_seconds(self) -> float | None:
        """Seconds of CPU that the group has had; None where nobody counts."""
        for folder in self.folders:
            with suppress(OSError, ValueError, KeyError):
                words = (folder / "cpu.stat").read_text().split()
                return int(dict(zip(words[::2], words[1::2], strict=True))["usage_usec"]) / 1e6
        return None

    def out_of_memory(self) -> bool:
        """Whether the kernel has killed a process of the group for want of memory."""
        for folder in self.folders:
            for name, key in (("memory.events", "oom_kill"), ("memory.oom_control", "oom_kill")):
                file = folder / name
                if file.exists():
                    words = dict(line.split() for line in file.read_text().splitlines() if " " in line)
                    if int(words.get(key, "0")) > 0:
                        return True
        return False


def create(name: str, bounds: Bounds, root: Path = ROOT) -> Cgroup:
    """A cgroup for the VM `name`, with as much of `bounds` as can be had.

    Args:
        name: the VM's id, a word.
        bounds: what it may have.
        root: where cgroups are mounted.
    """
    if (root / "cgroup.controllers").exists():
        return _create_v2(name, bounds, root)
    return _create_v1(name, bounds, root)


def _create_v2(name: str, bounds: Bounds, root: Path) -> Cgroup:
    settings = {
        "memory": ("memory.max", str(bounds.bytes)),
        "pids": ("pids.max", str(bounds.tasks)),
        "cpu": ("cpu.max", f"{bounds.quota} {_PERIOD}"),
    }
    try:
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].split("::", 1)[-1].lstrip("/")
        parent = (root / own).parent if own else root
        enabled = (parent / "cgroup.subtree_control").read_text().split()
        had = [name for name in bounds.controllers if name in enabled]
        missing = dict.fromkeys(
            (name for name in bounds.controllers if name not in had), f"not delegated to {parent}"
        )
        if not had:
            return Cgroup((), missing)
        folder = parent / (PREFIX + name)
        folder.mkdir()
    except OSError as error:
        return Cgroup((), dict.fromkeys(bounds.controllers, _reason(error)))
    try:
        for controller in had:
            file, value = settings[controller]
            (folder / file).write_text(value)
    except OSError as error:
        folder.rmdir()
        return Cgroup((), dict.fromkeys(bounds.controllers, _reason(error)))
    return Cgroup((folder,), missing)


def _create_v1(name: str, bounds: Bounds, root: Path) -> Cgroup:
    settings = {
        "memory": {"memory.limit_in_bytes": bounds.bytes},
        "pids": {"pids.max": bounds.tasks},
        "cpu": {"cpu.cfs_period_us": _PERIOD, "cpu.cfs_quota_us": bounds.quota},
    }
    folders: list[Path] = []
    missing: dict[str, str] = {}
    for controller in bounds.controllers:
        place = root / controller
        folder = place / (PREFIX + name)
        if not (place / "cgroup.procs").exists():
            missing[controller] = f"not mounted at {place}"
        elif not os.access(place, os.W_OK):
            missing[controller] = f"this user may not write to {place}"
        else:
            try:
                folder.mkdir()
                folders.append(folder)
                for file, value in settings[controller].items():
                    (folder / file).write_text(str(value))
            except OSError as error:
                missing[controller] = _reason(error)
                if folder in folders:
                    folders.remove(folder)
                    folder.rmdir()
    return Cgroup(tuple(folders), missing)


def _reason(error: OSError) -> str:
    return f"{error.strerror}: {error.filename}"
