"""vhost-user messages: what a front-end may say, and that nothing else gets through."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user import protocol
from sandbox_kernel.vhost_user.protocol import Request
from sandbox_kernel.virtio.memory import MAX_REGIONS, Region


@given(st.binary(max_size=16))
def test_any_header_is_parsed_or_refused(data: bytes) -> None:
    try:
        envelope = protocol.parse_header(data)
    except GuestProtocolError:
        return
    assert envelope.size <= protocol.MAX_PAYLOAD


@given(st.sampled_from(Request), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_only_requests_of_version_1_with_bounded_size_pass(request_: Request, flags: int, size: int) -> None:
    data = struct.pack("<III", request_, flags, size)
    acceptable = flags & 7 == 1 and size <= protocol.MAX_PAYLOAD
    if acceptable:
        assert protocol.parse_header(data) == protocol.Envelope(request_, size, bool(flags & 8))
    else:
        with pytest.raises(GuestProtocolError):
            protocol.parse_header(data)


@pytest.mark.parametrize(
    "parse",
    [
        protocol.parse_u64,
        protocol.parse_ring_state,
        protocol.parse_ring_addresses,
        protocol.parse_memory_table,
        lambda data: protocol.reply_config(data, bytes(8)),
    ],
)
@given(data=st.binary(max_size=protocol.MAX_PAYLOAD))
def test_any_payload_is_parsed_or_refused(parse: object, data: bytes) -> None:
    assert callable(parse)
    try:
        parse(data)
    except GuestProtocolError:
        pass


def test_a_memory_table_is_read_row_by_row() -> None:
    rows = [(0x1000, 0x1000, 0x7000, 0), (0x9000, 0x2000, 0x8000, 0x1000)]
    data = struct.pack("<II", 2, 0) + b"".join(struct.pack("<QQQQ", *row) for row in rows)
    assert protocol.parse_memory_table(data) == [Region(*row) for row in rows]


@pytest.mark.parametrize("count", [1, MAX_REGIONS + 1, 2**32 - 1])
def test_a_memory_table_with_fewer_bytes_than_rows_is_refused(count: int) -> None:
    with pytest.raises(GuestProtocolError):
        protocol.parse_memory_table(struct.pack("<II", count, 0) + bytes(31))


@given(offset=st.integers(0, 2**32 - 1), size=st.integers(0, 2**32 - 1))
def test_configuration_space_is_given_within_its_borders_only(offset: int, size: int) -> None:
    config = bytes(range(8))
    answer = protocol.reply_config(struct.pack("<III", offset, size, 0), config)
    request, flags, length = struct.unpack_from("<III", answer)
    assert (request, flags, length) == (Request.GET_CONFIG, 5, len(answer) - 12)
    if offset + size <= 8:
        assert answer[24:] == config[offset : offset + size]
    else:
        assert length == 0


def test_replies_have_the_form_of_the_specification() -> None:
    assert protocol.reply_u64(Request.GET_FEATURES, 3) == struct.pack("<IIIQ", 1, 5, 8, 3)
    assert protocol.reply_ring_state(1, 77) == struct.pack("<IIIII", 11, 5, 8, 1, 77)
