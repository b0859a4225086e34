"""What a group of processes has for itself, from smaps."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from bench import memory
from bench.memory import Mapping

_FIELDS = """\
Size:               2048 kB
KernelPageSize:        4 kB
Rss:                1024 kB
Pss:                {pss} kB
Pss_Dirty:             0 kB
Shared_Clean:          0 kB
Private_Clean:        {clean} kB
Private_Dirty:        {dirty} kB
Anonymous:          {anonymous} kB
Swap:                  8 kB
SwapPss:              {swap} kB
THPeligible:           0
VmFlags: rd wr mr mw me ac sd
"""


def smaps(
    header: str, pss: int = 0, clean: int = 0, dirty: int = 0, swap: int = 0, anonymous: int = 0
) -> str:
    fields = _FIELDS.format(pss=pss, clean=clean, dirty=dirty, swap=swap, anonymous=anonymous)
    return f"{header}\n{fields}"


LIBRARY = smaps("7f00-7f10 r-xp 00001000 08:01 1234    /usr/lib/x86_64-linux-gnu/libc.so.6", pss=40, clean=4)
HEAP = smaps("5500-5600 rw-p 00000000 00:00 0  [heap]", pss=512, dirty=512, anonymous=512)
NAMELESS = smaps("6600-6700 rw-p 00000000 00:00 0", pss=100, dirty=90, swap=10)
RAM = smaps(
    "7e0000-7f0000 rw-s 00000000 00:01 2049   /memfd:memory-backend-memfd (deleted)", pss=2048, dirty=1024
)


def test_mappings_are_told_apart_by_their_headers() -> None:
    assert memory.parse_smaps(LIBRARY + HEAP + NAMELESS + RAM) == [
        Mapping("/usr/lib/x86_64-linux-gnu/libc.so.6", 40, 4, 0, 0, "r-xp"),
        Mapping("[heap]", 512, 512, 0, 512, "rw-p"),
        Mapping("", 100, 90, 10, 0, "rw-p"),
        Mapping("/memfd:memory-backend-memfd (deleted)", 2048, 1024, 0, 0, "rw-s"),
    ]


def test_a_process_without_mappings_has_nothing() -> None:
    assert memory.parse_smaps("") == []
    assert memory.unique([[]]) == 0


def test_pages_of_others_do_not_count_and_swapped_ones_do() -> None:
    assert memory.unique([memory.parse_smaps(LIBRARY + HEAP + NAMELESS)]) == (4 + 512 + 90 + 10) / 1024


def test_a_guests_ram_counts_once_however_it_is_shared_in_the_group() -> None:
    both, nothing = (
        memory.parse_smaps(RAM),
        memory.parse_smaps(RAM.replace("Pss:                2048", "Pss: 0")),
    )
    assert memory.unique([both, both]) == 4.0
    assert memory.unique([both, nothing]) == 2.0


@pytest.mark.parametrize("shared", [True, False])
def test_real_memory_of_a_real_group_counts_once(shared: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """A parent fills 32 MiB of a memfd or of its own heap; a child that maps the memfd as well fills half."""
    size = 32 << 20
    fd = os.memfd_create("guest-ram")
    os.truncate(fd, size)
    view = mmap.mmap(fd, size) if shared else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    before = _group_size()
    view[:] = b"x" * size
    script = (
        f"import mmap, sys; m = mmap.mmap({fd}, {size}); m[:{size // 2}] = bytes({size // 2}); "
        "print(flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], pass_fds=(fd,), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdout.readline()
        own = memory.measure(child.pid)
        grown = _group_size() - before
    finally:
        child.stdin.close()
        child.wait()
        child.stdout.close()
        view.close()
        os.close(fd)
    # The child itself is an interpreter of a few MiB, and pytest's own heap moves by a few; a page counted
    # twice, or not at all, would show as 16 MiB.
    most = 32 if shared else 32 + 16
    assert most - 8 <= grown <= most + 14
    assert len(own) == 1


def _group_size() -> float:
    return sum(memory.measure(os.getpid()).values())


def test_a_group_is_a_process_and_everything_below_it(request: pytest.FixtureRequest) -> None:
    child = subprocess.Popen(["/bin/sh", "-c", "sleep 60 & read line"], stdin=subprocess.PIPE)
    finish: Callable[[], object] = child.kill
    request.addfinalizer(finish)
    names: set[str] = set()
    while names != {"sh", "sleep"} and child.poll() is None:
        names = {process.name() for process in memory.group(child.pid)}
    for process in memory.group(child.pid):
        process.kill()
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert names == {"sh", "sleep"}


def test_a_rollup_counts_shares_and_what_is_swapped_out() -> None:
    assert memory.parse_rollup(smaps("5500-7fff ---p 00000000 00:00 0    [rollup]", pss=500, swap=12)) == 0.5


def test_families_are_all_processes_below_the_roots() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in memory.families([os.getpid()])
        assert memory.families([child.pid]) == [child.pid]
        assert memory.share(child.pid) > 0
        assert memory.own(child.pid) > 0
    finally:
        child.communicate(b"\n")
    assert (memory.own(child.pid), memory.share(child.pid)) == (0.0, 0.0)
