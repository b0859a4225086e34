"""All streams of one VM: who gets a packet, what is refused, what is bounded."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.connection import ENDED, OPENED, State
from sandbox_kernel.vsock.muxer import Limits, Muxer
from sandbox_kernel.vsock.packet import Header

CID = 3


def answer(request: Header, operation: int, length: int = 0, **changes: int) -> Header:
    header = Header(
        CID, packet.HOST_CID, request.dst_port, request.src_port, length, packet.STREAM, operation, 0, 1000, 0
    )
    return header._replace(**changes)


def opened(muxer: Muxer, port: int) -> Header:
    """Open a stream to `port` and let the guest accept it; the REQUEST."""
    muxer.open(port)
    request = muxer.next_control()
    assert request is not None
    assert (request.operation, request.dst_port) == (packet.REQUEST, port)
    happened = muxer.receive(answer(request, packet.RESPONSE))
    assert happened is not None
    assert happened[1] == OPENED
    return request


def test_streams_to_one_port_are_told_apart() -> None:
    muxer = Muxer(CID)
    first, second = opened(muxer, 5), opened(muxer, 5)
    assert first.src_port != second.src_port
    happened = muxer.receive(answer(second, packet.RST))
    assert happened is not None
    assert happened[0].host_port == second.src_port
    assert len(muxer) == 1


def test_a_packet_of_no_stream_is_answered_by_a_reset_with_its_addresses_exchanged() -> None:
    muxer = Muxer(CID)
    assert muxer.receive(Header(CID, 2, 77, 88, 0, 1, packet.REQUEST, 0, 0, 0)) is None
    reset = muxer.next_control()
    assert reset == Header(2, CID, 88, 77, 0, 1, packet.RST, 0, 0, 0)
    assert muxer.next_control() is None


def test_a_reset_of_no_stream_is_not_answered() -> None:
    muxer = Muxer(CID)
    muxer.receive(Header(CID, 2, 77, 88, 0, 1, packet.RST, 0, 0, 0))
    assert not muxer.has_control


def test_an_unknown_type_is_answered_by_a_reset() -> None:
    muxer = Muxer(CID)
    request = opened(muxer, 5)
    assert muxer.receive(answer(request, packet.RW, type=2)) is None
    reset = muxer.next_control()
    assert reset is not None
    assert (reset.operation, reset.type) == (packet.RST, 2)


@pytest.mark.parametrize("changes", [{"src_cid": CID + 1}, {"dst_cid": 1}, {"src_cid": 2**64 - 1}])
def test_a_packet_of_another_guest_or_host_is_dropped(changes: dict[str, int]) -> None:
    muxer = Muxer(CID)
    request = opened(muxer, 5)
    assert muxer.receive(answer(request, packet.RST, **changes)) is None
    assert len(muxer) == 1
    assert not muxer.has_control


def test_a_violation_resets_its_stream_alone_with_one_logged_line(caplog: pytest.LogCaptureFixture) -> None:
    muxer = Muxer(CID)
    bad, _good = opened(muxer, 5), opened(muxer, 6)
    with caplog.at_level(logging.WARNING):
        happened = muxer.receive(answer(bad, packet.RESPONSE))
    assert happened is not None
    connection, events = happened
    assert (connection.state, events) == (State.CLOSED, ENDED)
    assert len(caplog.records) == 1
    assert len(muxer) == 1
    reset = muxer.next_control()
    assert reset is not None
    assert (reset.operation, reset.dst_port) == (packet.RST, 5)


def test_the_number_of_streams_is_limited() -> None:
    muxer = Muxer(CID, Limits(max_streams=2))
    opened(muxer, 1)
    opened(muxer, 2)
    with pytest.raises(ConnectionRefusedError, match="2 vsock streams"):
        muxer.open(3)


def test_a_muxer_whose_resets_are_not_taken_is_congested() -> None:
    muxer = Muxer(CID, Limits(max_resets=3))
    for port in range(3):
        assert not muxer.congested
        muxer.receive(Header(CID, 2, port, 1, 0, 1, packet.RW, 0, 0, 0))
    assert muxer.congested
    muxer.next_control()
    assert not muxer.congested


def test_streams_whose_end_is_never_confirmed_are_forgotten_oldest_first() -> None:
    muxer = Muxer(CID, Limits(max_streams=1, max_closing=2))
    sent = []
    for port in range(10):
        connection = muxer.open(port)
        while (header := muxer.next_control()) is not None:
            sent.append((header.operation, header.dst_port))
        request = Header(packet.HOST_CID, CID, connection.host_port, port, 0, 1, packet.REQUEST, 0, 0, 0)
        muxer.receive(answer(request, packet.RESPONSE))
        muxer.shut(connection, packet.SHUTDOWN_BOTH)
        assert len(muxer) <= 2
    resets = [port for operation, port in sent if operation == packet.RST]
    assert resets == list(range(7))


def test_a_muxer_that_is_cleared_owes_nothing() -> None:
    muxer = Muxer(CID)
    request = opened(muxer, 5)
    muxer.open(6)
    muxer.clear()
    assert len(muxer) == 0
    assert muxer.next_control() is None
    assert muxer.receive(answer(request, packet.RW)) is None


@given(st.binary(max_size=100))
def test_any_bytes_are_a_header_or_the_defined_error(data: bytes) -> None:
    try:
        header = packet.parse(data)
    except GuestProtocolError:
        assert len(data) < packet.SIZE
        return
    assert packet.pack(header) == data[: packet.SIZE]
    muxer = Muxer(CID)
    muxer.receive(header)
    muxer.receive(header._replace(src_cid=CID, dst_cid=2))
    assert muxer.has_control == (header.operation != packet.RST)


_FIELDS = st.tuples(
    st.integers(0, 3),
    st.integers(0, 9),
    st.one_of(st.just(0), st.integers(0, 2**32 - 1)),
    st.integers(0, 3),
    st.integers(0, 2**32 - 1),
    st.one_of(st.just(0), st.integers(0, 2**32 - 1)),
)


@given(st.lists(_FIELDS, max_size=60))
def test_arbitrary_packets_on_known_streams_keep_every_bound(packets: list[tuple[int, ...]]) -> None:
    limits = Limits(max_streams=3, max_closing=2, max_resets=4, window=1000)
    muxer = Muxer(CID, limits)
    ports = [muxer.open(port).host_port for port in range(3)]
    ports.append(99)
    for which, operation, length, flags, window, taken in packets:
        if muxer.congested:
            muxer.next_control()
        header = Header(CID, 2, which, ports[which], length, 1, operation, flags, window, taken)
        happened = muxer.receive(header)
        if happened is not None:
            connection, _ = happened
            assert connection.state is State.CLOSED or connection.undelivered <= limits.window
        assert len(muxer) <= limits.max_streams
        assert len(muxer._resets) <= limits.max_resets
