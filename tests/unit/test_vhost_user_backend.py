"""The vhost-user back-end against any sequence of messages: the defined error, and no file leaked."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.backend import FEATURES, Backend
from sandbox_kernel.vhost_user.channel import Message
from sandbox_kernel.vhost_user.protocol import MAX_PAYLOAD, Envelope, Request
from sandbox_kernel.vhost_user.ring import Ring

MEMORY = 65_536
USER = 0x7000_0000
PROTOCOL_FEATURES = 1 << 0 | 1 << 3 | 1 << 9


def test_a_doorbell_that_is_full_and_would_block_is_not_waited_for() -> None:
    ring, theirs = Ring(0, 4096), os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    ring.set_call(os.dup(theirs))
    ring.interrupt()
    assert os.eventfd_read(theirs) == 1
    os.eventfd_write(theirs, 2**64 - 2)
    os.set_blocking(theirs, True)
    ring.interrupt()
    ring.close()
    os.close(theirs)


class Recorder:
    """Whoever moves data; here it only notes which rings run."""

    def __init__(self) -> None:
        self.running: dict[int, Ring] = {}

    def ring_started(self, ring: Ring) -> None:
        assert ring.queue is not None
        self.running[ring.index] = ring

    def ring_stopped(self, ring: Ring) -> None:
        self.running.pop(ring.index, None)


class Bench:
    """A back-end and what a front-end needs to talk to it."""

    def __init__(self) -> None:
        self.user = Recorder()
        self.backend = Backend(bytes(8), [Ring(0, 4096), Ring(1, 4096)], self.user)

    def say(
        self, request: Request, payload: bytes = b"", files: list[int] | None = None, ack: bool = False
    ) -> Any:
        return self.backend.handle(Message(Envelope(request, len(payload), ack), payload, files or []))

    def start(self, index: int, base: int = 0) -> None:
        self.say(Request.SET_VRING_NUM, struct.pack("<II", index, 8))
        self.say(Request.SET_VRING_BASE, struct.pack("<II", index, base))
        at = USER + 0x1000 * index
        self.say(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, at, at + 0x200, at + 0x100, 0))
        self.say(Request.SET_VRING_KICK, struct.pack("<Q", index), [eventfd()])
        self.say(Request.SET_VRING_CALL, struct.pack("<Q", index), [eventfd()])
        self.say(Request.SET_VRING_ENABLE, struct.pack("<II", index, 1))

    def share(self) -> None:
        self.say(Request.SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, 0, MEMORY, USER, 0), [memfd()])


def eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC)


def memfd() -> int:
    file = os.memfd_create("memory", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(file, MEMORY)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return file


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture
def bench() -> Iterator[Bench]:
    before = open_files()
    bench = Bench()
    yield bench
    bench.backend.close()
    bench.backend.close()
    assert open_files() == before


def test_a_ring_runs_once_everything_is_known_whatever_the_order(bench: Bench) -> None:
    bench.say(Request.SET_FEATURES, struct.pack("<Q", FEATURES))
    bench.start(0)
    assert not bench.user.running
    bench.share()
    assert list(bench.user.running) == [0]
    bench.start(1)
    assert list(bench.user.running) == [0, 1]


def test_a_ring_is_enabled_from_the_start_without_protocol_features(bench: Bench) -> None:
    bench.share()
    bench.say(Request.SET_FEATURES, struct.pack("<Q", 1 << 32))
    bench.say(Request.SET_VRING_NUM, struct.pack("<II", 0, 8))
    bench.say(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, USER, USER + 0x200, USER + 0x100, 0))
    bench.say(Request.SET_VRING_KICK, struct.pack("<Q", 0), [eventfd()])
    assert list(bench.user.running) == [0]


def test_a_stopped_ring_tells_how_far_it_came_and_is_fresh_only_elsewhere(bench: Bench) -> None:
    bench.share()
    bench.start(0, base=7)
    ring = bench.user.running[0]
    assert not ring.fresh
    answer = bench.say(Request.GET_VRING_BASE, struct.pack("<II", 0, 0))
    assert answer[12:] == struct.pack("<II", 0, 7)
    assert not bench.user.running
    bench.say(Request.SET_VRING_BASE, struct.pack("<II", 0, 7))
    assert not ring.fresh
    bench.say(Request.SET_VRING_BASE, struct.pack("<II", 0, 0))
    assert ring.fresh


def test_rings_go_on_in_a_new_memory_table(bench: Bench) -> None:
    bench.share()
    bench.start(0, base=3)
    before = bench.user.running[0].queue
    bench.share()
    after = bench.user.running[0].queue
    assert after is not None
    assert after is not before
    assert after.base == 3


def test_a_ring_is_disabled_and_enabled_again_where_it_was(bench: Bench) -> None:
    bench.share()
    bench.start(0, base=5)
    bench.say(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 0))
    assert not bench.user.running
    bench.say(Request.SET_VRING_ENABLE, struct.pack("<II", 0, 1))
    queue = bench.user.running[0].queue
    assert queue is not None
    assert queue.base == 5


def test_an_acknowledgement_is_sent_when_it_was_negotiated_and_asked_for(bench: Bench) -> None:
    assert bench.say(Request.SET_OWNER, ack=True) is None
    bench.say(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", PROTOCOL_FEATURES))
    assert bench.say(Request.SET_OWNER) is None
    assert bench.say(Request.SET_OWNER, ack=True) == struct.pack("<IIIQ", Request.SET_OWNER, 5, 8, 0)


def test_ring_addresses_outside_the_table_are_refused(bench: Bench) -> None:
    bench.share()
    with pytest.raises(GuestProtocolError, match="not within one region"):
        bench.start(0)
        at = USER + MEMORY - 16
        bench.say(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", 0, 0, at, at, at, 0))


U32 = st.one_of(st.integers(0, 3), st.sampled_from([8, 256, 2**32 - 1]), st.integers(0, 2**32 - 1))
U64 = st.one_of(
    st.integers(0, 3),
    st.sampled_from([USER, USER + 0x100, USER + 0x200, 0x101, 2**64 - 1]),
    st.integers(0, 2**64 - 1),
)
PAYLOAD = st.one_of(
    st.just(b""),
    st.builds(lambda value: struct.pack("<Q", value), U64),
    st.builds(lambda *values: struct.pack("<II", *values), st.integers(0, 2), U32),
    st.builds(lambda *values: struct.pack("<IIQQQQ", *values), st.integers(0, 2), U32, U64, U64, U64, U64),
    st.just(struct.pack("<IIQQQQ", 1, 0, 0, MEMORY, USER, 0)),
    st.binary(max_size=MAX_PAYLOAD),
)
FILES = st.lists(st.sampled_from([eventfd, memfd]), max_size=3)


@settings(max_examples=150)
@given(
    st.booleans(), st.lists(st.tuples(st.sampled_from(Request), PAYLOAD, FILES, st.booleans()), max_size=30)
)
def test_any_messages_give_answers_or_the_defined_error_and_leak_no_file(
    started: bool, messages: list[tuple[Request, bytes, list[Any], bool]]
) -> None:
    before = open_files()
    bench = Bench()
    try:
        if started:
            bench.share()
            bench.start(0)
            bench.start(1)
        for request, payload, makers, ack in messages:
            bench.say(request, payload, [make() for make in makers], ack)
    except GuestProtocolError:
        pass
    bench.backend.close()
    assert not bench.user.running
    del bench
    assert open_files() == before
