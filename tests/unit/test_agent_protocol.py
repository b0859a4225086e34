"""Frames of the agent's protocol."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.agent import protocol
from sandbox_kernel.agent.protocol import HEADER, FrameError, pack, parse_header, parse_message
from sandbox_kernel.resources import guest_dir

json_objects = st.dictionaries(
    st.text(max_size=20), st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=50)
)


@given(json_objects, st.binary(max_size=1000))
def test_a_frame_is_read_as_it_was_written(message: dict[str, object], payload: bytes) -> None:
    frame = pack(message, payload)
    json_length, payload_length = parse_header(frame[: HEADER.size])
    body = frame[HEADER.size :]
    assert parse_message(body[:json_length]) == message
    assert body[json_length:] == payload
    assert payload_length == len(payload)


@given(st.binary(min_size=HEADER.size, max_size=HEADER.size))
def test_any_header_is_understood_or_refused(header: bytes) -> None:
    try:
        json_length, payload_length = parse_header(header)
    except FrameError:
        return
    assert json_length <= protocol.MAX_JSON
    assert payload_length <= protocol.MAX_PAYLOAD


@given(st.binary(max_size=300) | st.just(b"[" * 100_000))
def test_any_message_is_an_object_or_refused(body: bytes) -> None:
    try:
        assert isinstance(parse_message(body), dict)
    except FrameError:
        pass


def test_another_version_is_refused_with_the_fix() -> None:
    with pytest.raises(FrameError, match="rebuild the image with `sandbox-kernel image build`"):
        parse_header(HEADER.pack(protocol.MAGIC, protocol.PROTOCOL_VERSION + 1, 0, 0))


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(FrameError, match=f"the limit is {protocol.MAX_JSON}"):
        pack({"x": "y" * protocol.MAX_JSON})
    with pytest.raises(FrameError, match=f"the limit is {protocol.MAX_PAYLOAD}"):
        pack({}, bytes(protocol.MAX_PAYLOAD + 1))


def test_host_and_guest_have_the_same_protocol() -> None:
    assert (guest_dir() / "agent_protocol.py").read_text() == Path(protocol.__file__).read_text()
