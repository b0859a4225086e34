"""The parts of a kernel's memory, from the text of smaps."""

from __future__ import annotations

import pytest

from bench.memory import parse_smaps, unique
from bench.parts import (
    ANONYMOUS,
    CACHE,
    FILES,
    READ,
    WRITTEN,
    Anatomy,
    Process,
    dissect,
    middle,
    parse_page_tables,
)

_MAPPING = """\
{addresses} {mode} 00000000 08:01 1234    {name}
Size:             262144 kB
Pss:                {pss} kB
Private_Clean:      {clean} kB
Private_Dirty:      {dirty} kB
Anonymous:          {anonymous} kB
SwapPss:            {swap} kB
VmFlags: rd wr mr mw me ac sd
"""


def mapping(mode: str, name: str = "", **sizes: int) -> str:
    fields = {"pss": 0, "clean": 0, "dirty": 0, "anonymous": 0, "swap": 0} | sizes
    return _MAPPING.format(addresses="7f2757fff000-7f2797fff000", mode=mode, name=name, **fields)


def process(name: str, *mappings: str, page_tables: int = 0) -> Process:
    return Process(name, tuple(parse_smaps("".join(mappings))), page_tables)


SUPERVISOR = process("python3", mapping("rw-p", "[heap]", dirty=3072), page_tables=100)


def test_what_a_clone_wrote_is_told_from_what_it_alone_has_read() -> None:
    ram = mapping("rw-p", "/ram", pss=9000, clean=2048, dirty=4096, anonymous=4096)
    parts = dissect([SUPERVISOR, process("qemu-system-x86_64", ram)]).parts
    assert parts == {f"QEMU: {WRITTEN}": 4, f"supervisor: {ANONYMOUS}": 3, f"QEMU: {READ}": 2}


def test_written_pages_that_were_swapped_out_are_still_written() -> None:
    ram = mapping("rw-p", "/ram", dirty=1024, anonymous=1024, swap=1024)
    assert dissect([SUPERVISOR, process("qemu-system-x86_64", ram)]).parts[f"QEMU: {WRITTEN}"] == 2


def test_a_vm_that_booted_has_written_all_that_it_has() -> None:
    name = "/memfd:memory-backend-memfd (deleted)"
    qemu = process("qemu-system-x86_64", mapping("rw-s", name, pss=4096, dirty=2048))
    device = process("python3", mapping("rw-s", name, pss=1024))
    parts = dissect([device, qemu]).parts
    assert parts[f"QEMU: {WRITTEN}"] + parts[f"supervisor: {WRITTEN}"] == 5


@pytest.mark.parametrize(
    "cache",
    [
        mapping("rwxp", "", pss=8192, dirty=8192, anonymous=8192),
        mapping("rw-s", "/memfd:tcg-jit (deleted)", pss=4096) + mapping("r-xs", "/memfd:tcg-jit", pss=4096),
    ],
)
def test_memory_that_qemu_made_executable_is_its_translation_cache(cache: str) -> None:
    program = mapping("r-xp", "/usr/bin/qemu-system-x86_64", clean=512)
    heap = mapping("rw-p", "", dirty=1024, anonymous=1024)
    parts = dissect([SUPERVISOR, process("qemu-system-x86_64", cache, program, heap)]).parts
    assert (parts[f"QEMU: {CACHE}"], parts[f"QEMU: {FILES}"], parts[f"QEMU: {ANONYMOUS}"]) == (8, 0.5, 1)


def test_under_kvm_there_is_no_translation_cache() -> None:
    parts = dissect([SUPERVISOR, process("qemu-system-x86_64", mapping("rw-p", "", dirty=1024))]).parts
    assert f"QEMU: {CACHE}" not in parts


def test_the_small_processes_stay_whole_and_the_parts_make_up_the_unique_memory() -> None:
    small = mapping("rw-p", "[stack]", dirty=64) + mapping("r--p", "/usr/lib/libc.so.6", dirty=64)
    processes = [SUPERVISOR, process("sh", small), process("bwrap", small)]
    anatomy = dissect(processes)
    assert anatomy.parts == {f"supervisor: {ANONYMOUS}": 3, "guardian": 0.125, "bubblewrap": 0.125}
    assert anatomy.total == unique(each.mappings for each in processes)
    assert anatomy.page_tables == 100 / 1024


def test_a_plain_kernel_is_its_own_only_process() -> None:
    plain = process(
        "python3", mapping("rw-p", "[heap]", dirty=2048), mapping("r--p", "/lib/x.so", dirty=1024)
    )
    assert dissect([plain]).parts == {f"kernel: {ANONYMOUS}": 2, f"kernel: {FILES}": 1}


def test_the_middle_kernel_is_one_that_there_is() -> None:
    small, medium, large = (Anatomy({"": size}, 0) for size in (1.0, 2.0, 30.0))
    assert middle([large, small, medium]) is medium
    assert middle([large, small]) is small


def test_page_tables_are_read_from_a_status() -> None:
    assert parse_page_tables("VmSwap:\t 0 kB\nVmPTE:\t     624 kB\nThreads:\t5\n") == 624
    assert parse_page_tables("Name:\tqemu\nState:\tZ (zombie)\n") == 0
