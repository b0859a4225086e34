"""Jupyter's messages as the relay reads and writes them, against jupyter_client's Session."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session

from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.relay.message import (
    DELIMITER,
    Author,
    Signer,
    find_delimiter,
    is_kind,
    read_content,
    read_parent,
    read_request,
)
from sandbox_kernel.relay.welcome import welcome

KEY = b"key"
SESSION = Session(key=KEY)


def request(kind: str = "execute_request", session: Session = SESSION) -> tuple[str, list[bytes]]:
    message = session.msg(kind, {"code": "1"})
    return message["header"]["msg_id"], [b"client", *session.serialize(message)]


def test_what_is_written_is_accepted_by_jupyter() -> None:
    message_id, frames = request()
    written = Author(Signer(KEY, "hmac-sha256")).message("execute_reply", {"status": "error"}, frames[3])
    _, rest = SESSION.feed_identities(list(written))
    message = SESSION.deserialize(rest)
    assert message["parent_header"]["msg_id"] == message_id
    assert message["content"] == {"status": "error"}


def test_without_a_key_the_signature_is_empty() -> None:
    assert Signer(b"", "hmac-sha256").sign([b"a"]) == b""
    assert Signer(b"", "hmac-sha256").verifies(b"whatever", [b"a"])


@pytest.mark.parametrize("scheme", ["", "sha256", "hmac-", "hmac-rot13"])
def test_an_unknown_scheme_is_refused(scheme: str) -> None:
    with pytest.raises(ConfigurationError, match="hmac-sha256"):
        Signer(KEY, scheme)


def test_a_signed_request_is_recognised() -> None:
    message_id, frames = request()
    found = read_request("shell", frames, Signer(KEY, "hmac-sha256"), 8)
    assert found is not None
    assert (found.id, found.kind, found.identities) == (message_id, "execute_request", (b"client",))
    assert found.header == frames[3]


@pytest.mark.parametrize("kind", ["comm_msg", "input_reply"])
def test_what_nobody_answers_is_no_request(kind: str) -> None:
    assert read_request("shell", request(kind)[1], Signer(KEY, "hmac-sha256"), 8) is None


def test_a_request_with_a_wrong_signature_is_none() -> None:
    forged = request(session=Session(key=b"other"))[1]
    assert read_request("shell", forged, Signer(KEY, "hmac-sha256"), 8) is None


FRAMES = st.lists(st.one_of(st.binary(max_size=40), st.just(DELIMITER), st.just(b"{}"), st.just(b"[" * 9999)))


@given(FRAMES)
def test_arbitrary_frames_are_no_trouble(frames: list[bytes]) -> None:
    assert read_request("shell", frames, Signer(KEY, "hmac-sha256"), 8) is None
    at = find_delimiter(frames, 8)
    if at is not None:
        assert at <= 8
        assert frames[at] == DELIMITER
        assert read_parent(frames, at) is None
        assert isinstance(read_content(frames, at), dict)
        assert not is_kind(frames, at, b"iopub_welcome")


def test_only_a_subscription_to_text_is_welcomed() -> None:
    author = Author(Signer(KEY, "hmac-sha256"))
    assert [welcome(event, author) for event in (b"", b"\x00topic", b"\x01\xff", b"\x01" + b"x" * 2000)] == [
        None
    ] * 4
    topics, rest = SESSION.feed_identities(list(welcome(b"\x01topic", author) or []))
    assert topics == [b"topic"]
    assert SESSION.deserialize(rest)["content"] == {"subscription": "topic"}
