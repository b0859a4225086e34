"""The memory that a kernel has for itself, every process of it counted.

A kernel's processes are the one that its provisioner names and everything below that in the tree: for a
plain kernel the Python process; for a micro-VM the supervisor, its guardian, bubblewrap and QEMU.

What counts, from `/proc/PID/smaps` (proc(5)):

- `Private_Clean` + `Private_Dirty` + `SwapPss` of each mapping: pages that no other process maps. Pages of
  libraries that somebody else uses, too, would be there without this kernel and do not count.
- Of a mapping of anonymous shared memory (`/memfd:…`, `/dev/shm/…`, `/dev/zero`), such as the guest's RAM,
  which QEMU and the supervisor both map: `Pss` instead. A process's Pss of a page is the page's size
  divided by the number of processes that map it, so over the group a page counts once, also when only one
  process has touched it.

A VM of a pool has a supervisor that is a fork of the pool's zygote. It counts like any other; the pages of
the interpreter that it still shares with the zygote and its other children do not count, nor does the zygote.

What does not count: page tables and other memory of the host's kernel, and the host's page cache for the
image that all VMs share. The guest's own page cache is RAM of the guest and counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

_HEADER = re.compile(r"[0-9a-f]+-[0-9a-f]+ (?P<mode>\S{4}) [0-9a-f]+ \S+ \d+\s*(?P<name>.*)")
_SHARED_ANONYMOUS = ("/memfd:", "/dev/shm/", "/dev/zero", "/SYSV")
_MIB = 1024


@dataclass(frozen=True)
class Mapping:
    """One mapping of a process; sizes in KiB.

    Attributes:
        name: file, or the kernel's name for it, or empty.
        pss: proportional share.
        private: pages that no other process maps.
        swap: proportional share of what is swapped out.
        anonymous: pages that are of no file, or no longer: written in a private mapping.
        mode: `rwxp`, with `-` for what is not allowed and `s` for shared.
    """

    name: str
    pss: int
    private: int
    swap: int
    anonymous: int = 0
    mode: str = ""

    @property
    def own(self) -> int:
        """What of it counts for the group that the process belongs to, in KiB."""
        return (self.pss if self.name.startswith(_SHARED_ANONYMOUS) else self.private) + self.swap


def parse_smaps(text: str) -> list[Mapping]:
    """The mappings in the text of a `/proc/PID/smaps`."""
    mappings: list[Mapping] = []
    name, mode = None, ""
    sizes: dict[str, int] = {}

    def close() -> None:
        if name is not None:
            private = sizes.get("Private_Clean", 0) + sizes.get("Private_Dirty", 0)
            private += sizes.get("Private_Hugetlb", 0)
            swap, anonymous = sizes.get("SwapPss", 0), sizes.get("Anonymous", 0)
            mappings.append(Mapping(name, sizes.get("Pss", 0), private, swap, anonymous, mode))

    for line in text.splitlines():
        header = _HEADER.fullmatch(line)
        if header is not None:
            close()
            name, mode, sizes = header["name"], header["mode"], {}
            continue
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            sizes[key] = int(value[:-3])
    close()
    return mappings


def unique(processes: Iterable[Iterable[Mapping]]) -> float:
    """MiB that a group of processes, each given by its mappings, has for itself."""
    return sum(mapping.own for mappings in processes for mapping in mappings) / _MIB


def group(root: int) -> list[psutil.Process]:
    """The process `root` and everything below it."""
    top = psutil.Process(root)
    return [top, *top.children(recursive=True)]


def families(roots: Iterable[int]) -> list[int]:
    """The processes `roots` and everything below them, as process ids."""
    below: dict[int, list[int]] = {}
    for process in psutil.process_iter(["ppid"]):
        below.setdefault(process.info["ppid"], []).append(process.pid)
    found = list(roots)
    for pid in found:
        found += below.get(pid, [])
    return found


def own(pid: int) -> float:
    """MiB that count for the process `pid`; 0 when it has ended.

    Raises:
        PermissionError: it may not be looked at.
    """
    try:
        return unique([parse_smaps(Path(f"/proc/{pid}/smaps").read_text())])
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def share(pid: int) -> float:
    """MiB of the process `pid`, its share of what several processes map included (Pss); 0 when it has ended.

    Raises:
        PermissionError: it may not be looked at.
    """
    try:
        return parse_rollup(Path(f"/proc/{pid}/smaps_rollup").read_text())
    except (FileNotFoundError, ProcessLookupError):
        return 0.0


def parse_rollup(text: str) -> float:
    """MiB of `Pss` and `SwapPss` in the text of a `/proc/PID/smaps_rollup`."""
    lines = [line.split() for line in text.splitlines()]
    return sum(int(line[1]) for line in lines if line[0] in ("Pss:", "SwapPss:")) / _MIB


def measure(root: int) -> dict[str, float]:
    """MiB by process, `name pid`, of the kernel whose provisioner names `root`.

    Raises:
        PermissionError: a process of the group may not be looked at.
    """
    return {f"{process.name()} {process.pid}": own(process.pid) for process in group(root)}
