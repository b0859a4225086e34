"""Guest memory: what lies in a region can be reached, and nothing else."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.virtio.memory import MAX_REGIONS, GuestMemory, MappedMemory, ProcessMemory, Region

PAGE = 4096
U64 = st.integers(0, 2**64 - 1)

Opener = Callable[[], GuestMemory]


def sealed_file(size: int, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    file = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


@pytest.fixture(params=["mapped", "process"])
def memory(request: pytest.FixtureRequest) -> Iterator[GuestMemory]:
    """Two regions, [0x1000, 0x3000) and [0x8000, 0x9000), the file in the reverse order of the addresses."""
    file = sealed_file(3 * PAGE)
    mapping = mmap.mmap(file, 3 * PAGE)
    user = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    regions = [Region(0x1000, 2 * PAGE, user + PAGE, PAGE), Region(0x8000, PAGE, user, 0)]
    opened: GuestMemory
    if request.param == "mapped":
        opened = MappedMemory(regions, [file, file])
    else:
        opened = ProcessMemory(regions, os.getpid())
    yield opened
    opened.close()
    opened.close()
    os.close(file)


def test_what_is_written_is_read(memory: GuestMemory) -> None:
    memory.write(0x1FFE, b"abcd")
    assert bytes(memory.read(0x1FFE, 4)) == b"abcd"
    assert memory.load16(0x1FFE) == int.from_bytes(b"ab", "little")
    memory.store32(0x8FFC, 0x01020304)
    assert bytes(memory.read(0x8FFC, 4)) == bytes([4, 3, 2, 1])


def test_a_borrowed_buffer_reaches_the_guest_when_committed(memory: GuestMemory) -> None:
    buffer = memory.borrow(0x8000, 100)
    buffer[:3] = b"xyz"
    memory.commit(0x8000, buffer[:3])
    assert bytes(memory.read(0x8000, 4)) == b"xyz\0"


def test_an_access_never_leaves_its_region(memory: GuestMemory) -> None:
    outside = [(0xFFF, 1), (0xFFF, 2), (0x2FFF, 2), (0x3000, 1), (0x7FFF, 2), (0x8FFF, 2), (2**64 - 1, 2)]
    for address, length in outside:
        for access in (
            lambda: memory.read(address, length),  # noqa: B023
            lambda: memory.write(address, bytes(length)),  # noqa: B023
            lambda: memory.borrow(address, length),  # noqa: B023
        ):
            with pytest.raises(GuestProtocolError):
                access()


def test_an_address_of_the_front_end_is_translated(memory: GuestMemory) -> None:
    file = sealed_file(PAGE)
    regions = [Region(0x5000, PAGE, 0x7000_0000_0000, 0)]
    with_known_address = MappedMemory(regions, [file])
    os.close(file)
    assert with_known_address.guest_address(0x7000_0000_0010, 16) == 0x5010
    for user, length in [(0x7000_0000_0FFF, 2), (0x6FFF_FFFF_FFFF, 1), (0x5000, 1)]:
        with pytest.raises(GuestProtocolError):
            with_known_address.guest_address(user, length)


@given(address=U64, length=st.integers(0, 2**32))
def test_any_address_gives_bytes_or_the_defined_error(address: int, length: int) -> None:
    file = sealed_file(PAGE)
    mapped = MappedMemory([Region(2**64 - PAGE, PAGE, 0, 0)], [file])
    os.close(file)
    try:
        assert len(mapped.read(address, length)) == length
    except GuestProtocolError:
        assert not 2**64 - PAGE <= address <= 2**64 - length


@given(rows=st.lists(st.tuples(U64, U64, U64, U64), max_size=MAX_REGIONS + 1))
def test_any_table_is_mapped_or_refused(rows: list[tuple[int, int, int, int]]) -> None:
    file = sealed_file(PAGE)
    try:
        regions = [Region(*row) for row in rows]
        MappedMemory(regions, [file] * len(regions)).close()
    except GuestProtocolError:
        pass
    finally:
        os.close(file)


def test_a_region_must_be_within_its_file() -> None:
    file = sealed_file(PAGE)
    with pytest.raises(GuestProtocolError, match="beyond the end"):
        MappedMemory([Region(0, PAGE, 0, PAGE)], [file])
    os.close(file)


def test_regions_may_not_overlap() -> None:
    file = sealed_file(2 * PAGE)
    with pytest.raises(GuestProtocolError, match="overlap"):
        MappedMemory([Region(0, PAGE, 0, 0), Region(PAGE - 1, PAGE, PAGE, PAGE)], [file, file])
    os.close(file)


@pytest.mark.parametrize("kind", ["unsealed", "pipe"])
def test_a_file_that_could_shrink_is_refused(kind: str) -> None:
    read_end, write_end = os.pipe()
    file = sealed_file(PAGE, seals=fcntl.F_SEAL_GROW)
    with pytest.raises(GuestProtocolError, match=r"seal=on|memfd"):
        MappedMemory([Region(0, PAGE, 0, 0)], [file if kind == "unsealed" else read_end])
    for fd in (read_end, write_end, file):
        os.close(fd)


def test_memory_of_no_process_is_refused_and_unmapped_pages_are_the_defined_error() -> None:
    with pytest.raises(GuestProtocolError, match="cannot be opened"):
        ProcessMemory([Region(0, PAGE, 0, 0)], 2**22 + 1)
    nowhere = ProcessMemory([Region(0, PAGE, 16, 0), Region(PAGE, PAGE, 2**63, 0)], os.getpid())
    for access in (lambda: nowhere.read(0, 8), lambda: nowhere.write(0, b"x"), lambda: nowhere.load16(PAGE)):
        with pytest.raises(GuestProtocolError, match="cannot be reached"):
            access()
    nowhere.close()
