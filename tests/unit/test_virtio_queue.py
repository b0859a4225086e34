"""The split virtqueue from the device's side."""

from __future__ import annotations

import fcntl
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.virtio.memory import MappedMemory, Region
from sandbox_kernel.virtio.queue import MAX_SIZE, SplitQueue, check_size

MEMORY = 65_536
TABLE, AVAILABLE, USED = 0, 0x4000, 0x5000
NEXT, WRITE, INDIRECT = 1, 2, 4
LIMIT = 10_000


class Driver:
    """The other end of the queue."""

    def __init__(self, size: int = 8, base: int = 0) -> None:
        file = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(file, MEMORY)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.memory = MappedMemory([Region(0, MEMORY, 0, 0)], [file])
        os.close(file)
        self.size = size
        self.index = base
        self.queue = SplitQueue(
            self.memory,
            size=size,
            descriptors=TABLE,
            available=AVAILABLE,
            used=USED,
            base=base,
            max_chain_bytes=LIMIT,
        )

    def describe(self, index: int, address: int, length: int, flags: int = 0, following: int = 0) -> None:
        self.memory.write(TABLE + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.memory.write(AVAILABLE + 4 + 2 * (self.index % self.size), struct.pack("<H", head))
            self.index = (self.index + 1) & 0xFFFF
        self.memory.write(AVAILABLE + 2, struct.pack("<H", self.index))

    def used(self) -> tuple[int, int]:
        """Flags and index of the used ring."""
        flags, index = struct.unpack("<HH", self.memory.read(USED, 4))
        return flags, index


def test_a_chain_is_taken_and_returned() -> None:
    driver = Driver()
    driver.describe(3, 100, 10, NEXT, 5)
    driver.describe(5, 200, 0, NEXT, 1)
    driver.describe(1, 300, 30, WRITE)
    driver.offer(3)
    chain = driver.queue.pop()
    assert chain is not None
    assert (chain.head, chain.readable, chain.writable) == (3, [(100, 10)], [(300, 30)])
    assert driver.queue.pop() is None
    driver.queue.complete(3, 7)
    assert driver.used()[1] == 0
    assert driver.queue.publish()
    assert driver.used()[1] == 1
    assert struct.unpack("<II", driver.memory.read(USED + 4, 8)) == (3, 7)
    assert not driver.queue.publish()


def test_a_chain_that_is_put_back_is_given_again() -> None:
    driver = Driver()
    driver.describe(0, 0, 1)
    driver.offer(0)
    first = driver.queue.pop()
    driver.queue.undo()
    assert driver.queue.pop() == first


@given(base=st.integers(0, 0xFFFF), batches=st.lists(st.integers(0, 8), max_size=40))
def test_every_chain_is_returned_once_in_order_over_any_wrap(base: int, batches: list[int]) -> None:
    driver = Driver(base=base)
    for index in range(8):
        driver.describe(index, index, 1)
    total = 0
    for batch in batches:
        heads = [(total + i) % 8 for i in range(batch)]
        driver.offer(*heads)
        for head in heads:
            chain = driver.queue.pop()
            assert chain is not None
            assert chain.head == head
            driver.queue.complete(head, total)
        assert driver.queue.pop() is None
        driver.queue.publish()
        for i, head in enumerate(heads):
            slot = (base + total + i) % 8
            assert struct.unpack("<II", driver.memory.read(USED + 4 + 8 * slot, 8)) == (head, total)
        total += batch
        if total:
            assert driver.used()[1] == (base + total) & 0xFFFF
    assert driver.queue.base == (base + total) & 0xFFFF


def test_no_interrupt_is_wanted_when_the_driver_says_so() -> None:
    driver = Driver()
    driver.describe(0, 0, 1)
    driver.offer(0)
    driver.queue.pop()
    driver.queue.complete(0, 0)
    driver.memory.write(AVAILABLE, struct.pack("<H", 1))
    assert not driver.queue.publish()
    assert driver.used()[1] == 1


def test_kicks_are_refused_and_accepted_and_a_chain_offered_between_is_seen() -> None:
    driver = Driver()
    driver.queue.refuse_kicks()
    assert driver.used()[0] == 1
    assert not driver.queue.accept_kicks()
    assert driver.used()[0] == 0
    driver.queue.refuse_kicks()
    driver.describe(0, 0, 1)
    driver.offer(0)
    assert driver.queue.accept_kicks()


def test_a_queue_set_up_anew_does_not_inherit_a_refusal() -> None:
    driver = Driver()
    driver.queue.refuse_kicks()
    again = SplitQueue(
        driver.memory,
        size=8,
        descriptors=TABLE,
        available=AVAILABLE,
        used=USED,
        base=0,
        max_chain_bytes=LIMIT,
    )
    again.accept_kicks()
    assert driver.used()[0] == 0


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(0, 1, INDIRECT, 0)], "indirect"),
        ([(0, 1, NEXT, 8)], "outside"),
        ([(0, 1, NEXT, 0)], "longer than"),
        ([(0, 1, NEXT, 1), (0, 0, NEXT, 0)], "longer than"),
        ([(0, 1, WRITE | NEXT, 1), (0, 1, 0, 0)], "after a writable"),
        ([(0, LIMIT + 1, 0, 0)], "larger than"),
        ([(0, LIMIT, NEXT, 1), (0, 1, 0, 0)], "larger than"),
        ([(0, 2**32 - 1, NEXT, 1), (0, 2**32 - 1, 0, 0)], "larger than"),
    ],
)
def test_a_bad_chain_is_refused(rows: list[tuple[int, int, int, int]], reason: str) -> None:
    driver = Driver()
    for index, row in enumerate(rows):
        driver.describe(index, *row)
    driver.offer(0)
    with pytest.raises(GuestProtocolError, match=reason):
        driver.queue.pop()


def test_a_head_outside_the_table_is_refused() -> None:
    driver = Driver()
    driver.offer(8)
    with pytest.raises(GuestProtocolError, match="outside"):
        driver.queue.pop()


@pytest.mark.parametrize("ahead", [9, 1000, 0xFFFF])
def test_an_available_index_beyond_the_queue_is_refused(ahead: int) -> None:
    driver = Driver()
    driver.memory.write(AVAILABLE + 2, struct.pack("<H", ahead))
    with pytest.raises(GuestProtocolError, match="jumps"):
        driver.queue.pop()


@pytest.mark.parametrize("size", [0, 3, 100, MAX_SIZE * 2, 2**32 - 1])
def test_a_size_that_is_no_power_of_two_or_too_large_is_refused(size: int) -> None:
    with pytest.raises(GuestProtocolError):
        check_size(size)


@pytest.mark.parametrize(
    ("descriptors", "available", "used"),
    [(8, AVAILABLE, USED), (TABLE, 0x4001, USED), (TABLE, AVAILABLE, 0x5002), (MEMORY - 16, AVAILABLE, USED)],
)
def test_rings_that_are_unaligned_or_outside_memory_are_refused(
    descriptors: int, available: int, used: int
) -> None:
    memory = Driver().memory
    with pytest.raises(GuestProtocolError):
        SplitQueue(
            memory,
            size=8,
            descriptors=descriptors,
            available=available,
            used=used,
            base=0,
            max_chain_bytes=LIMIT,
        )


@settings(max_examples=200)
@given(
    table=st.binary(min_size=128, max_size=128),
    ring=st.lists(st.integers(0, 9), min_size=8, max_size=8),
    index=st.integers(0, 8),
)
def test_arbitrary_tables_give_chains_or_the_defined_error(table: bytes, ring: list[int], index: int) -> None:
    driver = Driver()
    driver.memory.write(TABLE, table)
    driver.memory.write(AVAILABLE, struct.pack("<HH8H", 0, index, *ring))
    try:
        for _ in range(index):
            chain = driver.queue.pop()
            assert chain is not None
            lengths = [length for _, length in chain.readable + chain.writable]
            assert sum(lengths) <= LIMIT
            assert all(lengths)
        assert driver.queue.pop() is None
    except GuestProtocolError:
        pass
