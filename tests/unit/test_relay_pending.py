"""Who is still waiting for an answer, and what they are told."""

from __future__ import annotations

import dataclasses

from jupyter_client.session import Session

from sandbox_kernel.death import Death
from sandbox_kernel.relay.death import report as death_report
from sandbox_kernel.relay.message import Author, Request, Signer
from sandbox_kernel.relay.pending import PendingRequests, Unanswered


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


class Watcher:
    def __init__(self) -> None:
        self.seen: list[str] = []

    def began(self, cell: Unanswered) -> None:
        self.seen.append(f"+{cell.request.id}")

    def ended(self, cell: Unanswered) -> None:
        self.seen.append(f"-{cell.request.id}")


def watched(limit: int = 10) -> tuple[PendingRequests, Watcher]:
    pending, watcher = PendingRequests(limit, iter(range(100)).__next__), Watcher()
    pending.watchers.append(watcher)
    return pending, watcher


def test_a_cell_runs_when_the_one_before_it_is_answered_whatever_the_kernel_says() -> None:
    pending, watcher = watched()
    for name in "abc":
        pending.asked(request(name))
    pending.asked(request("question", "complete_request"))
    assert [cell.request.id for cell in pending.running] == ["a"]
    pending.answered("shell", (b"client",), "a")
    pending.answered("shell", (b"client",), "question")
    assert [(cell.request.id, cell.since) for cell in pending.running] == [("b", 1)]
    pending.answered("shell", (b"client",), "c")
    pending.answered("shell", (b"client",), "b")
    assert watcher.seen == ["+a", "-a", "+b", "-b"]
    assert not len(pending)


def test_each_subshell_has_a_running_cell_of_its_own() -> None:
    pending, watcher = watched()
    pending.asked(request("main"))
    pending.asked(dataclasses.replace(request("sub"), subshell="1"))
    pending.asked(dataclasses.replace(request("later"), subshell="1"))
    assert watcher.seen == ["+main", "+sub"]
    pending.answered("shell", (b"client",), "sub")
    assert watcher.seen[2:] == ["-sub", "+later"]


def test_what_is_forgotten_has_ended() -> None:
    pending, watcher = watched()
    pending.asked(request("a"))
    pending.asked(request("b"))
    pending.forget()
    assert watcher.seen == ["+a", "-a"]
    pending.asked(request("c"))
    assert watcher.seen[2:] == ["+c"]


def test_a_running_cell_gets_an_error_and_a_reply_and_other_requests_no_error() -> None:
    pending = PendingRequests(3, lambda: 100.0)
    pending.asked(request("cell"))
    pending.asked(request("queued"))
    pending.asked(request("question", "complete_request", b"other"))
    session = Session(key=b"key")
    told = []
    death = Death("KernelCrashed", "It is over.")
    for channel, frames in death_report(pending, death, Author(Signer(b"key", "hmac-sha256")), 107.0):
        identities, rest = session.feed_identities(list(frames))
        message = session.deserialize(rest)
        asked = message["parent_header"]["msg_id"]
        told.append((channel, message["msg_type"], asked, message["content"].get("status", "")))
        if channel == "shell":
            assert identities == [b"other" if asked == "question" else b"client"]
        if asked == "cell" and channel == "shell":
            assert message["content"]["evalue"] == "It is over."
            assert message["metadata"]["sandbox_kernel"]["cell_seconds"] == 7
    assert told == [
        ("iopub", "error", "cell", ""),
        ("shell", "execute_reply", "cell", "error"),
        ("iopub", "status", "cell", ""),
        ("shell", "execute_reply", "queued", "aborted"),
        ("iopub", "status", "queued", ""),
        ("shell", "complete_reply", "question", "error"),
        ("iopub", "status", "question", ""),
    ]


def test_a_cell_whose_id_was_used_before_has_its_own_time() -> None:
    pending, watcher = watched()
    pending.asked(request("a"))
    pending.asked(request("a"))
    pending.answered("shell", (b"client",), "a")
    assert watcher.seen == ["+a", "-a", "+a"]
    assert [cell.since for cell in pending.running] == [1]
    pending.answered("shell", (b"client",), "a")
    assert watcher.seen == ["+a", "-a", "+a", "-a"]
    assert len(pending) == 0
