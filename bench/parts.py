"""What the private memory of a kernel's processes consists of: each mapping has its part. Pure.

A part is told by what Linux says of a mapping (proc(5), smaps):

    guest RAM, written      anonymous pages of the RAM's file: private copies of a template's pages; without a
                            template the RAM is anonymous shared memory (memfd), and all of it is written
    guest RAM, only read    the file's own pages, while no other process maps them
    translation cache       anonymous memory that may be executed: the only such memory that QEMU has
                            (tcg/region.c), or `tcg-jit`, mapped twice, where a host forbids that
    heap, anonymous         malloc's, stacks, memory of devices, data of programs that was never in a file
    programs, libraries     pages of files, most of them copied by the loader to put in addresses

QEMU under KVM translates nothing, and has no such cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from bench.memory import Mapping as Memory

WRITTEN = "guest RAM, written"
READ = "guest RAM, only read"
CACHE = "translation cache"
ANONYMOUS = "heap, anonymous"
FILES = "programs, libraries"

_ROLES = {"qemu-system-x86_64": "QEMU", "bwrap": "bubblewrap", "sh": "guardian", "dash": "guardian"}
_WHOLE = ("bubblewrap", "guardian")
"""Too small to be taken apart."""
_RAM = ("/ram", "/memfd:memory-backend-memfd")
"""A template's RAM as the jail sees it (`sandbox_kernel.jail.bubblewrap.RAM`); RAM of a VM that booted."""
_JIT = "/memfd:tcg-jit"
_KIB = 1024


@dataclass(frozen=True)
class Process:
    """One process of a kernel.

    Attributes:
        name: of its program.
        mappings: all of them.
        page_tables: KiB of page tables (`VmPTE` in /proc/PID/status), which no process's memory includes.
    """

    name: str
    mappings: tuple[Memory, ...]
    page_tables: int


@dataclass(frozen=True)
class Anatomy:
    """Where the memory of one kernel is.

    Attributes:
        parts: MiB by part, `process: part`, largest first.
        page_tables: MiB of page tables of all its processes, not among the parts.
    """

    parts: Mapping[str, float]
    page_tables: float

    @property
    def total(self) -> float:
        """MiB of all parts: the kernel's unique memory (bench.memory)."""
        return sum(self.parts.values())


def dissect(processes: Iterable[Process]) -> Anatomy:
    """Sorts the memory of a kernel's processes, of which the first is the one that the provisioner names."""
    first, *below = processes
    roles = ["supervisor" if below else "kernel", *(_ROLES.get(each.name, each.name) for each in below)]
    parts: dict[str, float] = {}
    for role, process in zip(roles, (first, *below), strict=True):
        for mapping in process.mappings:
            for part, kib in _of_mapping(mapping):
                name = role if role in _WHOLE else f"{role}: {part}"
                parts[name] = parts.get(name, 0.0) + kib / _KIB
    largest_first = sorted(parts.items(), key=lambda part: -part[1])
    return Anatomy(dict(largest_first), sum(each.page_tables for each in (first, *below)) / _KIB)


def _of_mapping(mapping: Memory) -> Iterator[tuple[str, int]]:
    """What of a mapping counts for its kernel, as KiB by part."""
    if mapping.name.startswith(_RAM):
        # A page that was written and has been swapped out is still a page that was written.
        written = min(mapping.own, mapping.anonymous + mapping.swap) if "p" in mapping.mode else mapping.own
        yield WRITTEN, written
        yield READ, mapping.own - written
    elif mapping.name.startswith(_JIT) or (not mapping.name and "x" in mapping.mode):
        yield CACHE, mapping.own
    elif mapping.name.startswith("/"):
        yield FILES, mapping.own
    else:
        yield ANONYMOUS, mapping.own


def middle(anatomies: Iterable[Anatomy]) -> Anatomy:
    """The kernel whose total is the median of all; of two in the middle the smaller one.

    Raises:
        IndexError: there are none.
    """
    ordered = sorted(anatomies, key=lambda each: each.total)
    return ordered[(len(ordered) - 1) // 2]


def parse_page_tables(status: str) -> int:
    """KiB of page tables in the text of a `/proc/PID/status`; 0 for a process that has ended."""
    for line in status.splitlines():
        if line.startswith("VmPTE:"):
            return int(line.split()[1])
    return 0
