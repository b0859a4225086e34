"""ZMTP towards the guest: libzmq is understood; what breaks a bound is refused before it is kept."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.relay import zmtp
from sandbox_kernel.relay.zmtp import Bounds, Frame, LeftOut, Reader

PREAMBLE = zmtp.greeting() + zmtp.ready("ROUTER", b"")


def reader(bytes_: int = 1 << 20, frames: int = 100) -> Reader:
    return Reader("shell", {"ROUTER"}, Bounds(bytes_, frames))


def feed(target: Reader, data: bytes, most: int = 1 << 30) -> list[list[bytes]]:
    """Gives `data` to a reader, at most `most` bytes a time; of what is left out, its beginning and size."""
    got: list[list[Frame] | LeftOut] = []
    rest = memoryview(data)
    while rest:
        space = target.space()
        count = min(len(space), len(rest), most)
        assert count > 0
        space[:count] = rest[:count]
        rest = rest[count:]
        got += target.received(count)
    return [
        [*map(bytes, message.frames), str(message.size).encode()]
        if isinstance(message, LeftOut)
        else [bytes(frame) for frame in message]
        for message in got
    ]


def wire(message: list[bytes]) -> bytes:
    return b"".join(zmtp.encode(message))


def resident() -> int:
    """This process's memory in RAM, in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


MESSAGES = st.lists(
    st.lists(
        st.one_of(st.binary(max_size=300), st.sampled_from([bytes(32_767), bytes(32_768), bytes(70_000)])),
        min_size=1,
        max_size=8,
    ),
    max_size=8,
)


@given(MESSAGES, st.sampled_from([1, 2, 7, 63, 4096, 1 << 30]))
def test_messages_survive_however_they_are_cut(messages: list[list[bytes]], most: int) -> None:
    if most < 63:
        messages = [[frame[:300] for frame in message] for message in messages]
    target = reader()
    assert feed(target, PREAMBLE + b"".join(map(wire, messages)), most) == messages
    assert target.ready


@given(st.binary(max_size=500), st.booleans(), st.integers(1, 100))
def test_nothing_but_a_protocol_error_comes_out_of_arbitrary_bytes(
    data: bytes, greet: bool, most: int
) -> None:
    target = reader()
    try:
        feed(target, (PREAMBLE if greet else b"") + data, most)
    except GuestProtocolError as error:
        assert "channel shell" in str(error)


@pytest.mark.parametrize("length", [(1 << 24) + 1, 1 << 40, (1 << 64) - 1])
def test_a_length_far_over_the_bound_is_refused_by_its_head(length: int) -> None:
    with pytest.raises(GuestProtocolError, match="more than 16777216 bytes"):
        feed(reader(), PREAMBLE + b"\x02" + length.to_bytes(8, "big"))


@pytest.mark.parametrize("most", [997, 4096, 1 << 30])
@pytest.mark.parametrize("after", [0, 2], ids=["last", "in the middle"])
@pytest.mark.parametrize("before", [0, 1, 2])
def test_what_is_too_large_is_left_out_and_what_follows_is_taken(before: int, after: int, most: int) -> None:
    beginning, end = [b"x", bytes(40_000)][:before], [b"", bytes(40_000)][:after]
    large = [*beginning, bytes(100_001), *end]
    got = feed(reader(bytes_=100_000), PREAMBLE + wire(large) + wire([b"next"]), most)
    assert [len(frame) for frame in got[0][:-1]] == [len(frame) for frame in beginning]
    assert int(got[0][-1]) == sum(map(len, large))
    assert got[1:] == [[b"next"]]


def test_a_message_that_is_left_out_takes_no_memory() -> None:
    before = resident()
    target = reader(bytes_=100 << 20)
    feed(target, PREAMBLE + b"\x03" + (90 << 20).to_bytes(8, "big") + bytes(1000))
    target = reader(bytes_=10 << 20)
    feed(target, PREAMBLE + b"\x02" + (150 << 20).to_bytes(8, "big") + bytes(1000))
    assert len(target.space()) <= 1 << 16
    assert resident() - before < 20 << 20


def test_a_message_of_exactly_the_bound_is_taken() -> None:
    message = [bytes(1 << 19), bytes(1 << 19)]
    assert feed(reader(), PREAMBLE + wire(message)) == [message]


def test_frames_are_summed_up_over_a_message_and_forgotten_after_it() -> None:
    message = [bytes(1 << 19), bytes(1 << 19)]
    assert feed(reader(), PREAMBLE + wire(message) * 3) == [message] * 3
    assert feed(reader(), PREAMBLE + wire([*message, b"x"])) == [[*message, b"1048577"]]


def test_more_frames_than_the_bound_are_refused() -> None:
    assert len(feed(reader(), PREAMBLE + wire([b""] * 100))[0]) == 100
    with pytest.raises(GuestProtocolError, match="more than 100 frames"):
        feed(reader(), PREAMBLE + wire([b""] * 101))


def test_a_frame_announced_and_not_sent_claims_no_memory() -> None:
    before = resident()
    target = Reader("shell", {"ROUTER"}, Bounds(1 << 40, 1))
    feed(target, PREAMBLE + b"\x02" + (1 << 30).to_bytes(8, "big"))
    assert len(target.space()) == 1 << 30
    assert resident() - before < 1 << 28


def test_a_frame_that_the_host_has_no_memory_for_is_the_guests_fault() -> None:
    target = Reader("shell", {"ROUTER"}, Bounds(1 << 60, 1))
    with pytest.raises(GuestProtocolError, match="no memory"):
        feed(target, PREAMBLE + b"\x02" + (1 << 50).to_bytes(8, "big"))


def test_commands_after_the_handshake_are_ignored() -> None:
    assert feed(reader(), PREAMBLE + b"\x04\x05\x04PING" + wire([b"x"])) == [[b"x"]]


def test_libzmq_is_understood_and_understands() -> None:
    ours, path = socket.socket(socket.AF_UNIX), "\0relay-zmtp-test"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, ours:
        router.linger = 0
        router.bind("ipc://@" + path[1:])
        ours.connect(path)
        target, got = reader(), []
        ours.sendall(zmtp.greeting())
        while not target.greeted:
            feed(target, ours.recv(10_000))
        ours.sendall(zmtp.ready("DEALER", b"me"))
        while not target.ready:
            feed(target, ours.recv(10_000))
        ours.sendall(wire([b"hello", bytes(100_000)]))
        assert router.recv_multipart() == [b"me", b"hello", bytes(100_000)]
        router.send_multipart([b"me", b"", b"x" * 255, b"y" * 256, b"z" * 100_000])
        while not got:
            got = feed(target, ours.recv(10_000))
        assert got == [[b"", b"x" * 255, b"y" * 256, b"z" * 100_000]]
