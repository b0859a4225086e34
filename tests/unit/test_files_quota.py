"""What a guest writes through a mount is counted before it is done, whatever it says of itself."""

from __future__ import annotations

import errno
import struct

import pytest

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.files.quota import Messages, Quota


def message(kind: int, body: bytes, tag: int = 7) -> bytes:
    return struct.pack("<IBH", 7 + len(body), kind, tag) + body


def write(count: int, offset: int = 0, data: bytes | None = None) -> bytes:
    return message(118, struct.pack("<IQI", 1, offset, count) + (bytes(count) if data is None else data))


def resize(size: int, valid: int = 8) -> bytes:
    return message(26, struct.pack("<IIIIIQQQQQ", 1, valid, 0, 0, 0, size, 0, 0, 0, 0))


REFUSED = struct.pack("<IBHI", 11, 7, 7, errno.EDQUOT)


def test_bytes_are_counted_and_refused_when_they_are_used_up() -> None:
    quota = Quota.of(100, 0)
    assert quota.refuse(write(60)) is None
    assert quota.refuse(write(41)) == REFUSED
    assert quota.refuse(write(40)) is None
    assert quota.refuse(write(1)) == REFUSED
    assert quota.refuse(write(0)) is None


def test_writing_over_what_is_there_counts_as_well() -> None:
    quota = Quota.of(100, 0)
    assert [quota.refuse(write(50, 0)) for _ in range(3)] == [None, None, REFUSED]


@pytest.mark.parametrize("kind", [14, 16, 18, 70, 72])
def test_each_new_name_is_counted(kind: int) -> None:
    quota = Quota.of(0, 2)
    assert [quota.refuse(message(kind, bytes(40))) for _ in range(3)] == [None, None, REFUSED]


def test_a_file_cannot_be_made_larger_than_what_may_be_written() -> None:
    quota = Quota.of(100, 0)
    assert quota.refuse(resize(100)) is None
    assert quota.refuse(resize(101)) == REFUSED
    assert quota.refuse(resize(101, valid=1)) is None  # sets another attribute


def test_without_bounds_nothing_is_refused() -> None:
    quota = Quota.of(0, 0)
    for each in (write(1 << 16), resize(1 << 40), message(14, b"x"), message(116, bytes(16))):
        assert quota.refuse(each) is None


@pytest.mark.parametrize(
    "broken",
    [
        message(118, b"short"),
        message(26, b"short"),
        write(100, data=b"fewer"),
        write(0xFFFFFFFF, data=b""),
        write(10, offset=(1 << 63) - 5),
        write(1, offset=(1 << 64) - 1),
    ],
)
def test_a_message_that_no_client_sends_ends_the_mount(broken: bytes) -> None:
    with pytest.raises(GuestProtocolError):
        Quota.of(0, 0).refuse(broken)


def test_a_stream_is_cut_into_messages_wherever_it_is_torn() -> None:
    sent = [write(10), message(120, b"abcd"), write(0)]
    stream = b"".join(sent)
    for size in (1, 3, 7, 11, len(stream)):
        messages, found = Messages(100), []
        for start in range(0, len(stream), size):
            found += messages.receive(stream[start : start + size])
        assert found == sent


@pytest.mark.parametrize("size", [0, 6, 101, 0xFFFFFFFF])
def test_a_size_that_no_message_has_is_refused_before_it_is_waited_for(size: int) -> None:
    with pytest.raises(GuestProtocolError) as caught:
        list(Messages(100).receive(struct.pack("<IBH", size, 118, 1)))
    assert str(caught.value) == f"A message of 9p says it has {size} bytes; 7 to 100 may be."
