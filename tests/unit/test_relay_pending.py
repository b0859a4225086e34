"""Who is still waiting for an answer, and what they are told."""

from __future__ import annotations

from jupyter_client.session import Session

from sandbox_kernel.relay import death
from sandbox_kernel.relay.message import Author, Request, Signer
from sandbox_kernel.relay.pending import PendingRequests


def request(name: str, kind: str = "execute_request", client: bytes = b"client") -> Request:
    return Request("shell", (client,), b'{"msg_id": "%s"}' % name.encode(), name, kind)


def names(pending: PendingRequests) -> list[str]:
    return [each.request.id for each in pending]


def test_an_answer_strikes_a_request_off() -> None:
    pending = PendingRequests(10)
    for name in "abc":
        pending.asked(request(name))
    pending.answered("shell", (b"client",), "b")
    assert names(pending) == ["a", "c"]


def test_an_answer_on_another_channel_or_to_another_client_strikes_nothing_off() -> None:
    pending = PendingRequests(10)
    pending.asked(request("a"))
    pending.answered("control", (b"client",), "a")
    pending.answered("shell", (b"other",), "a")
    pending.answered("shell", (b"client",), "unknown")
    assert names(pending) == ["a"]


def test_a_flood_never_pushes_the_running_cell_out() -> None:
    pending = PendingRequests(3)
    pending.asked(request("cell"))
    for number in range(100):
        pending.asked(request(str(number), "complete_request"))
    assert names(pending) == ["cell", "98", "99"]
    for name in "abcdef":
        pending.asked(request(name))
    assert names(pending) == ["cell", "a", "b"]
    assert len(pending) == 3


def test_a_cell_is_told_with_its_prompt_number() -> None:
    pending = PendingRequests(3)
    pending.asked(request("a"))
    pending.asked(request("b"))
    pending.counted("a", 7)
    pending.counted("unknown", 8)
    assert [each.execution_count for each in pending] == [7, 0]


def test_a_cell_gets_an_error_a_reply_and_idle_and_other_requests_no_error() -> None:
    pending = PendingRequests(3)
    pending.asked(request("cell"))
    pending.asked(request("question", "complete_request", b"other"))
    session = Session(key=b"key")
    told = []
    for channel, frames in death.report(pending, "It is over.", Author(Signer(b"key", "hmac-sha256")), True):
        identities, rest = session.feed_identities(list(frames))
        message = session.deserialize(rest)
        told.append((channel, message["msg_type"], message["parent_header"]["msg_id"]))
        if channel == "shell":
            assert identities == [b"client" if message["parent_header"]["msg_id"] == "cell" else b"other"]
            assert message["content"]["status"] == "error"
            assert message["content"]["traceback"] == ["It is over."]
    assert told == [
        ("iopub", "error", "cell"),
        ("shell", "execute_reply", "cell"),
        ("iopub", "status", "cell"),
        ("shell", "complete_reply", "question"),
        ("iopub", "status", "question"),
    ]
