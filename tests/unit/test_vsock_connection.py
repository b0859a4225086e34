"""One vsock stream's bookkeeping: opening, credit, half-close, reset."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.connection import (
    DATA,
    ENDED,
    OPENED,
    PEER_DEAF,
    PEER_DONE,
    Connection,
    State,
    StreamViolation,
)
from sandbox_kernel.vsock.packet import Header

WINDOW = 1000


class Stream:
    """A connection, and what the guest would send on it."""

    def __init__(self, *, opened: bool = True, window: int = WINDOW) -> None:
        self.outbox: deque[Connection] = deque()
        self.connection = Connection(3, 1024, 5, self.outbox, WINDOW)
        assert self.control() == packet.REQUEST
        self.window = window
        self.taken = 0
        if opened:
            assert self.says(packet.RESPONSE) == OPENED

    def says(self, operation: int, length: int = 0, flags: int = 0, taken: int | None = None) -> int:
        fwd = self.taken if taken is None else taken
        header = Header(3, 2, 5, 1024, length, 1, operation, flags, self.window, fwd % 2**32)
        return self.connection.receive(header)

    def owed(self) -> Header | None:
        return self.outbox.popleft().next_control() if self.outbox else None

    def control(self) -> int:
        header = self.owed()
        return header.operation if header else 0


def test_a_stream_begins_with_a_request_and_opens_by_a_response() -> None:
    stream = Stream(opened=False)
    assert stream.connection.state is State.CONNECTING
    assert stream.connection.credit() == 0
    assert stream.says(packet.RESPONSE) == OPENED
    assert stream.connection.state is State.OPEN
    assert stream.connection.credit() == WINDOW


def test_a_reset_ends_a_stream_in_any_state_and_is_not_answered() -> None:
    for opened in (False, True):
        stream = Stream(opened=opened)
        assert stream.says(packet.RST) == ENDED
        assert stream.connection.state is State.CLOSED
        assert stream.owed() is None
        assert stream.says(packet.RW, 10) == 0


def test_credit_is_what_the_guest_can_buffer_less_what_is_in_flight() -> None:
    stream = Stream(window=500)
    header = stream.connection.data_header(200)
    assert (header.operation, header.length) == (packet.RW, 200)
    assert stream.connection.credit() == 300
    stream.says(packet.CREDIT_UPDATE, taken=150)
    assert stream.connection.credit() == 450


def test_a_guest_that_shrinks_its_buffer_below_what_is_in_flight_has_no_credit() -> None:
    stream = Stream(window=500)
    stream.connection.data_header(400)
    stream.window = 100
    stream.says(packet.CREDIT_UPDATE)
    assert stream.connection.credit() == 0


def test_an_older_count_after_a_newer_one_is_ignored() -> None:
    stream = Stream(window=500)
    stream.connection.data_header(400)
    stream.says(packet.CREDIT_UPDATE, taken=300)
    stream.says(packet.CREDIT_UPDATE, taken=100)
    assert stream.connection.credit() == 400


def test_a_guest_cannot_have_taken_what_was_not_sent() -> None:
    stream = Stream()
    stream.connection.data_header(10)
    with pytest.raises(StreamViolation, match="never sent"):
        stream.says(packet.CREDIT_UPDATE, taken=11)


def test_a_credit_update_is_owed_when_half_of_the_window_was_taken() -> None:
    stream = Stream()
    assert stream.says(packet.RW, 600) == DATA
    stream.connection.delivered(499)
    assert stream.owed() is None
    stream.connection.delivered(1)
    header = stream.owed()
    assert header is not None
    assert (header.operation, header.fwd_cnt, header.buf_alloc) == (packet.CREDIT_UPDATE, 500, WINDOW)


def test_a_guest_with_a_small_buffer_gets_its_credit_update_earlier() -> None:
    # Newer Linux guests send no further ahead than their own buffer; waiting for half of ours would hang.
    stream = Stream(window=100)
    stream.says(packet.RW, 50)
    stream.connection.delivered(50)
    assert stream.control() == packet.CREDIT_UPDATE


def test_a_request_for_credit_is_answered_once() -> None:
    stream = Stream()
    for _ in range(100):
        stream.says(packet.CREDIT_REQUEST)
    assert stream.control() == packet.CREDIT_UPDATE
    assert stream.owed() is None


@given(st.lists(st.integers(1, WINDOW), min_size=1, max_size=20))
def test_data_beyond_the_credit_is_a_violation(lengths: list[int]) -> None:
    stream = Stream()
    total = 0
    for length in lengths:
        total += length
        if total > WINDOW:
            with pytest.raises(StreamViolation, match="credit"):
                stream.says(packet.RW, length)
            return
        assert stream.says(packet.RW, length) == DATA
        assert stream.connection.undelivered == total


@pytest.mark.parametrize(
    "operation", [packet.RW, packet.SHUTDOWN, packet.CREDIT_REQUEST, packet.REQUEST, 0, 99]
)
def test_nothing_but_an_answer_may_come_before_the_stream_is_open(operation: int) -> None:
    with pytest.raises(StreamViolation):
        Stream(opened=False).says(operation)


@pytest.mark.parametrize("operation", [packet.RESPONSE, packet.REQUEST, 0, 8, 65535])
def test_an_operation_that_makes_no_sense_is_a_violation(operation: int) -> None:
    with pytest.raises(StreamViolation):
        Stream().says(operation)


def test_a_payload_outside_of_data_is_a_violation() -> None:
    with pytest.raises(StreamViolation, match="payload"):
        Stream().says(packet.CREDIT_UPDATE, 1)


def test_half_closes_of_the_guest_add_up_and_the_second_is_answered_by_a_reset() -> None:
    stream = Stream()
    assert stream.says(packet.SHUTDOWN, flags=packet.SHUTDOWN_SEND) == PEER_DONE
    assert stream.says(packet.SHUTDOWN, flags=packet.SHUTDOWN_SEND) == 0
    assert stream.connection.credit() == WINDOW
    with pytest.raises(StreamViolation, match="after SHUTDOWN"):
        stream.says(packet.RW, 1)
    assert stream.says(packet.SHUTDOWN, flags=packet.SHUTDOWN_RECEIVE) == PEER_DEAF | ENDED
    assert stream.connection.state is State.CLOSED
    assert stream.control() == packet.RST


def test_half_closes_of_the_host_add_up_and_await_a_reset() -> None:
    stream = Stream()
    stream.connection.shut(packet.SHUTDOWN_SEND)
    header = stream.owed()
    assert header is not None
    assert (header.operation, header.flags) == (packet.SHUTDOWN, packet.SHUTDOWN_SEND)
    assert stream.connection.credit() == 0
    assert stream.says(packet.RW, 10) == DATA
    stream.connection.shut(packet.SHUTDOWN_RECEIVE)
    header = stream.owed()
    assert header is not None
    assert header.flags == packet.SHUTDOWN_BOTH
    assert stream.connection.state is State.CLOSING
    # What was on its way is dropped.
    assert stream.says(packet.RW, 10) == 0
    assert stream.says(packet.RST) == ENDED


def test_a_reset_of_the_host_replaces_all_that_was_owed() -> None:
    stream = Stream()
    stream.says(packet.CREDIT_REQUEST)
    stream.connection.shut(packet.SHUTDOWN_SEND)
    stream.connection.reset()
    assert stream.control() == packet.RST
    assert stream.owed() is None


class HonestGuest(RuleBasedStateMachine):
    """A guest that keeps the rules is never accused, both sides' books agree, and nothing is owed twice."""

    @initialize(guest_window=st.integers(1, 2 * WINDOW))
    def begin(self, guest_window: int) -> None:
        self.stream = Stream(window=guest_window)
        self.connection = self.stream.connection
        self.to_guest = 0
        self.told = 0
        self.granted = WINDOW
        self.from_guest = 0
        self.backlog = 0
        self.done = False

    @rule(share=st.floats(0, 1))
    def host_sends(self, share: float) -> None:
        length = int(self.connection.credit() * share)
        if length:
            header = self.connection.data_header(length)
            self.to_guest += length
            self.told = header.fwd_cnt
            assert self.to_guest - self.stream.taken <= self.stream.window

    @rule(share=st.floats(0, 1))
    def guest_takes(self, share: float) -> None:
        self.stream.taken += int((self.to_guest - self.stream.taken) * share)
        self.stream.says(packet.CREDIT_UPDATE)

    @precondition(lambda self: not self.done)
    @rule(share=st.floats(0, 1))
    def guest_sends(self, share: float) -> None:
        room = min(WINDOW, self.stream.window) - (self.from_guest - self.told)
        length = int(max(0, room) * share)
        assert self.stream.says(packet.RW, length) & DATA or self.connection.state is not State.OPEN
        self.from_guest += length
        self.backlog += length

    @rule(share=st.floats(0, 1))
    def local_reader_takes(self, share: float) -> None:
        count = int(self.backlog * share)
        self.backlog -= count
        self.connection.delivered(count)

    @rule()
    def guest_gets_what_is_owed(self) -> None:
        header = self.stream.owed()
        if header is not None:
            self.told = header.fwd_cnt

    @rule()
    def guest_half_closes(self) -> None:
        self.stream.says(packet.SHUTDOWN, flags=packet.SHUTDOWN_SEND)
        self.done = True

    @invariant()
    def books_agree(self) -> None:
        assert self.connection.undelivered == self.backlog <= WINDOW
        assert len(self.stream.outbox) <= 1

    @invariant()
    def a_guest_that_waits_for_credit_gets_it(self) -> None:
        window = min(WINDOW, self.stream.window)
        blocked = self.from_guest - self.told >= window
        if blocked and not self.backlog:
            assert self.stream.outbox


TestHonestGuest = HonestGuest.TestCase
TestHonestGuest.settings = settings(max_examples=60, stateful_step_count=40)


@settings(max_examples=300)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 65535]),
            st.one_of(st.just(0), st.integers(0, 2**32 - 1), st.integers(0, WINDOW)),
            st.integers(0, 7),
            st.integers(0, 2**32 - 1),
            st.one_of(st.just(0), st.integers(0, 2**32 - 1)),
        ),
        max_size=30,
    )
)
def test_arbitrary_headers_give_events_or_a_violation(headers: list[tuple[int, int, int, int, int]]) -> None:
    stream = Stream(opened=False)
    connection = stream.connection
    for operation, length, flags, window, taken in headers:
        try:
            connection.receive(Header(3, 2, 5, 1024, length, 1, operation, flags, window, taken))
        except StreamViolation:
            connection.reset()
        assert connection.undelivered <= WINDOW or connection.state is State.CLOSED
        if credit := connection.credit():
            connection.data_header(min(credit, 100))
        assert len(stream.outbox) <= 2
        stream.owed()
