"""Each subscriber of iopub gets its welcome, and from then on everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import zmq
from jupyter_client.session import Session

from tests.relay.conftest import MakeRig
from tests.relay.conversation import run
from tests.relay.rig import KEY, READY, Rig


class Subscriber:
    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._session = Session(key=KEY.encode())

    def next(self) -> tuple[list[bytes], dict[str, Any]]:
        """Topics and the message, its signature checked."""
        while True:
            assert self._socket.poll(READY * 1000)
            topics, frames = self._session.feed_identities(self._socket.recv_multipart())
            message = self._session.deserialize(frames)
            # A kernel's own warnings at its start belong to no request, and may come at any time.
            if message["msg_type"] != "stream" or message["parent_header"]:
                return topics, message


@contextmanager
def subscriber(rig: Rig, topic: bytes = b"") -> Iterator[Subscriber]:
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.subscribe(topic)
        socket.connect(rig.addresses["iopub"])
        yield Subscriber(socket)


def test_each_subscriber_is_welcomed(running: Rig) -> None:
    for _ in range(3):
        with subscriber(running) as first, subscriber(running) as second:
            for each in (first, second):
                topics, message = each.next()
                assert topics == []
                assert message["msg_type"] == "iopub_welcome"
                assert message["content"] == {"subscription": ""}
                assert message["parent_header"] == {}


def test_a_topic_is_welcomed_by_its_name(running: Rig) -> None:
    with subscriber(running, b"kernel.") as each:
        topics, message = each.next()
        assert topics == [b"kernel."]
        assert message["content"] == {"subscription": "kernel."}


def test_who_subscribed_before_the_guest_was_up_is_welcomed_and_hears_the_first_request(
    make_rig: MakeRig,
) -> None:
    rig = make_rig()
    client = rig.client(ready=False)
    with subscriber(rig) as early:
        request = client.kernel_info()
        rig.start()
        seen = []
        while not seen or seen[-1]["content"].get("execution_state") != "idle":
            seen.append(early.next()[1])
        assert "iopub_welcome" in [message["msg_type"] for message in seen]
        states = [
            message["content"]["execution_state"]
            for message in seen
            if message["parent_header"].get("msg_id") == request
        ]
        assert states == ["busy", "idle"]


def test_after_its_welcome_a_subscriber_misses_nothing(running: Rig) -> None:
    client = running.client()
    for number in range(20):
        with subscriber(running) as late:
            assert late.next()[1]["msg_type"] == "iopub_welcome"
            run(client, f"print({number})")
            told = []
            while told.count("status") < 2:
                told.append(late.next()[1]["msg_type"])
            # A line may come in two pieces, its end in the second.
            kinds = [kind for kind, _ in groupby(told)]
            assert kinds == ["status", "execute_input", "stream", "status"]


def test_a_topic_that_is_no_text_is_not_welcomed_and_does_no_harm(running: Rig) -> None:
    with subscriber(running, b"\xff\xfe"):
        assert run(running.client(), "print(1)").stdout == "1\n"
