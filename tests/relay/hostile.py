"""Guests that misbehave on purpose: decent channels from libzmq, and one that says what a test wants."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import zmq

from sandbox_kernel.relay import zmtp
from sandbox_kernel.relay.relay import CHANNELS
from tests.relay.rig import Rig

Script = Callable[[socket.socket], None]

PEERS = {"iopub": "XPUB"}


def speak(*messages: list[bytes]) -> Script:
    """A script: proper handshake, then these messages."""

    def script(connection: socket.socket) -> None:
        for message in messages:
            for piece in zmtp.encode(message):
                connection.sendall(piece)

    return script


def say(data: bytes) -> Script:
    """A script: proper handshake, then these bytes."""
    return lambda connection: connection.sendall(data)


def for_ever(data: bytes) -> Script:
    """A script: proper handshake, then the same bytes until the connection breaks."""

    def script(connection: socket.socket) -> None:
        while True:
            connection.sendall(data)

    return script


def jupyter(*identities: bytes, kind: str = "status", parent: str = "") -> list[bytes]:
    header = json.dumps({"msg_id": "x", "msg_type": kind}).encode()
    return [*identities, b"<IDS|MSG>", b"bad", header, json.dumps({"msg_id": parent}).encode(), b"{}", b"{}"]


@contextmanager
def guest(rig: Rig, channel: str, script: Script, greet: bool = True) -> Iterator[None]:
    """Listens where the guest of `rig` should; `channel` follows `script` on its first connections."""
    with ExitStack() as stack:
        context = stack.enter_context(zmq.Context())
        for name in CHANNELS:
            if name != channel:
                peer = stack.enter_context(context.socket(zmq.XPUB if name == "iopub" else zmq.ROUTER))
                peer.linger = 0
                peer.bind(rig.guest_addresses[name])
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(rig.guest_addresses[channel].removeprefix("ipc://"))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        if greet:
                            # The relay sends its greeting first; its READY comes when it has ours.
                            connection.recv(64, socket.MSG_WAITALL)
                            connection.sendall(
                                zmtp.greeting() + zmtp.ready(PEERS.get(channel, "ROUTER"), b"")
                            )
                        script(connection)
                        while connection.recv(4096):
                            pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        listener.shutdown(socket.SHUT_RDWR)
