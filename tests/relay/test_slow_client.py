"""A client that takes its time, or nothing at all, costs the others nothing and the host little."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import zmq
from jupyter_client.session import Session
from zmq.utils.monitor import recv_monitor_message

from sandbox_kernel.relay.limits import RelayLimits
from tests.relay.conftest import MakeRig
from tests.relay.conversation import run
from tests.relay.rig import KEY, READY, Rig

MEBIBYTE = 1 << 20


class Staller:
    """Subscribes to everything and reads when it is told to; its own queue is as short as can be."""

    def __init__(self, rig: Rig, subscriber: zmq.Socket[bytes]) -> None:
        self._socket = subscriber
        self._session = Session(key=KEY.encode())
        subscriber.rcvhwm = 1
        subscriber.reconnect_ivl = -1
        self._monitor = subscriber.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        subscriber.subscribe(b"")
        subscriber.connect(rig.addresses["iopub"])
        assert self.read()["msg_type"] == "iopub_welcome"

    def read(self) -> dict:  # type: ignore[type-arg]
        assert self._socket.poll(READY * 1000)
        return self._session.deserialize(self._session.feed_identities(self._socket.recv_multipart())[1])

    def read_all(self) -> list[dict]:  # type: ignore[type-arg]
        """All that comes until nothing has come for a while."""
        messages = []
        while self._socket.poll(500):
            messages.append(self.read())
        return messages

    def was_cut(self, within: float = 0) -> bool:
        """Whether the connection ended; a socket that has stopped reading only sees that when it reads."""
        return bool(self._monitor.poll(within * 1000)) and bool(recv_monitor_message(self._monitor))

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()


@contextmanager
def staller(rig: Rig) -> Iterator[Staller]:
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        made = Staller(rig, subscriber)
        try:
            yield made
        finally:
            made.close()


def test_20_megabytes_of_stdout_pass_a_stalled_client(running: Rig) -> None:
    client = running.client()
    with staller(running) as stalled:
        heard = run(client, "for i in range(10_000): print(f'{i:01999}', flush=True)")
        assert heard.stdout.split() == [f"{i:01999}" for i in range(10_000)]
        text = "".join(m["content"]["text"] for m in stalled.read_all() if m["msg_type"] == "stream")
        got = [int(line) for line in text.split()]
        # More than a stock kernel's 1000, in order, then a gap: PUB's behaviour.
        assert got[:2000] == list(range(2000))
        assert got == sorted(got)
        assert run(client, "print('still here')").stdout == "still here\n"
        # A line may come in two pieces, its end in the second.
        assert "".join(m["content"].get("text", "") for m in stalled.read_all()).endswith("still here\n")


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_a_client_that_holds_too_many_bytes_is_cut_and_the_others_lose_nothing(
    make_rig: MakeRig, transport: str
) -> None:
    rig = make_rig(transport=transport, limits=RelayLimits(client_bytes=8 * MEBIBYTE, stall=0.2))
    rig.start()
    client = rig.client()
    with staller(rig) as stalled:
        code = "for i in range(40): display({'text/plain': f'{i:<1000000}'}, raw=True)"
        assert [int(text) for text in run(client, code).shown] == list(range(40))
        stalled.read_all()
        assert stalled.was_cut(within=READY)
    assert run(client, "print('still here')").stdout == "still here\n"


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_clients_that_come_and_go_by_the_thousand_do_no_harm(make_rig: MakeRig, transport: str) -> None:
    rig = make_rig(transport=transport)
    rig.start()
    for channel in ("shell", "iopub"):
        where = rig.addresses[channel].split("://")[1]
        for _ in range(1500):
            with contextlib.ExitStack() as stack:
                if transport == "ipc":
                    passer_by = stack.enter_context(socket.socket(socket.AF_UNIX))
                    passer_by.connect(where)
                else:
                    host, port = where.split(":")
                    passer_by = stack.enter_context(socket.create_connection((host, int(port))))
                passer_by.recv(1)
    assert run(rig.client(), "print('still here')").stdout == "still here\n"


def test_while_a_lossless_kernel_waits_for_a_stalled_client_the_others_lose_nothing(
    make_rig: MakeRig,
) -> None:
    rig = make_rig(limits=RelayLimits(client_bytes=8 * MEBIBYTE, stall=3.0))
    rig.start()
    client = rig.client()
    with staller(rig):
        code = "for i in range(6000): display({'text/plain': f'{i:<40000}'}, raw=True)"
        assert [int(text) for text in run(client, code).shown] == list(range(6000))


def test_a_slow_client_slows_the_guest_and_loses_nothing(make_rig: MakeRig) -> None:
    rig = make_rig(limits=RelayLimits(client_bytes=4 * MEBIBYTE, stall=30))
    rig.start()
    client = rig.client()
    with staller(rig) as slow:
        client.execute("for i in range(40): display({'text/plain': f'{i:<1000000}'}, raw=True)")
        got: list[int] = []
        while len(got) < 40:
            message = slow.read()
            if message["msg_type"] == "display_data":
                got.append(int(message["content"]["data"]["text/plain"]))
        assert got == list(range(40))
        assert not slow.was_cut()
