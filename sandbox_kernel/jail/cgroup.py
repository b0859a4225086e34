"""The host's cgroup around a VM: a bound on what QEMU itself may take beyond the guest's RAM.

Where it can be had: a delegated cgroup v2 subtree (a systemd user scope, or root), or writable v1
controllers. Where not, `create` gives a group without folders and the reason, which the caller logs: the
guest's RAM is bounded by the VM anyway, only QEMU's own memory is then not.

A group's folders are removed by the guardian (`guardian.py`), which outlives whoever made them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "sandbox-kernel-"
OVERHEAD = 384
"""MiB that QEMU may use beside the guest's RAM: code, translation cache, buffers (profiled: 60 to 210)."""
PROCESSES = 64
"""Threads of QEMU and bubblewrap: vCPUs, I/O workers, the main loops."""


@dataclass(frozen=True)
class Cgroup:
    """One VM's cgroup, as the folders that make it up.

    Attributes:
        folders: one folder under v2, one per controller under v1, none where no cgroup is to be had.
        missing: why there is none; empty when there is.
    """

    folders: tuple[Path, ...]
    missing: str = ""

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


def create(name: str, memory: int, vcpus: int, root: Path = ROOT) -> Cgroup:
    """A cgroup for the VM `name`, or the reason why there is none.

    Args:
        name: the VM's id, a word.
        memory: the guest's RAM in MiB.
        vcpus: its virtual CPUs.
        root: where cgroups are mounted.
    """
    limit = (memory + OVERHEAD) * 1024 * 1024
    tasks = PROCESSES + 4 * vcpus
    try:
        if (root / "cgroup.controllers").exists():
            return _create_v2(name, limit, tasks, root)
        return _create_v1(name, limit, tasks, root)
    except OSError as error:
        return Cgroup((), f"no cgroup can be made for this user ({error.strerror}: {error.filename})")


def _create_v2(name: str, limit: int, tasks: int, root: Path) -> Cgroup:
    own = Path("/proc/self/cgroup").read_text().splitlines()[-1].split("::", 1)[-1].lstrip("/")
    parent = (root / own).parent if own else root
    enabled = (parent / "cgroup.subtree_control").read_text().split()
    if not {"memory", "pids"} <= set(enabled):
        return Cgroup((), f"the memory and pids controllers are not delegated to {parent}")
    folder = parent / (PREFIX + name)
    folder.mkdir()
    try:
        (folder / "memory.max").write_text(str(limit))
        (folder / "pids.max").write_text(str(tasks))
    except OSError:
        folder.rmdir()
        raise
    return Cgroup((folder,))


def _create_v1(name: str, limit: int, tasks: int, root: Path) -> Cgroup:
    settings = {"memory": ("memory.limit_in_bytes", limit), "pids": ("pids.max", tasks)}
    folders: list[Path] = []
    try:
        for controller, (file, value) in settings.items():
            if not (root / controller / "cgroup.procs").exists():
                return Cgroup((), f"the {controller} controller is not mounted at {root / controller}")
            if not os.access(root / controller, os.W_OK):
                return Cgroup((), f"this user may not write to {root / controller}")
            folder = root / controller / (PREFIX + name)
            folder.mkdir()
            folders.append(folder)
            (folder / file).write_text(str(value))
    except OSError:
        for folder in folders:
            folder.rmdir()
        raise
    return Cgroup(tuple(folders))
