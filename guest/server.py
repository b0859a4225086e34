"""Serves the agent's protocol: a thread per connection, at most MAX_CONNECTIONS, one request at a time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from agent_protocol import HEADER, MAX_CONNECTIONS, FrameError, pack, parse_header, parse_message
from operations import Refused

Perform = Callable[[dict[str, object], bytes], tuple[dict[str, object], bytes]]

_FRAME_DEADLINE = 30.0
"""Seconds for the rest of a frame to arrive once it has begun, and for an answer to be taken."""


class Server:
    """Accepts connections and answers requests until the machine ends."""

    def __init__(self, listener: socket.socket, perform: Perform, host: int | None) -> None:
        """Serves `listener`; with `host` given, only connections from that CID."""
        self._listener = listener
        self._perform = perform
        self._host = host
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def serve_forever(self) -> None:
        """Accepts; a connection too many is closed at once."""
        while True:
            connection, peer = self._listener.accept()
            if (self._host is not None and peer[0] != self._host) or not self._places.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                while (frame := receive(connection)) is not None:
                    connection.sendall(self._answer(*frame))
        except (OSError, FrameError):
            pass  # the host is gone or does not speak the protocol: this connection is over
        finally:
            self._places.release()

    def _answer(self, request: dict[str, object], payload: bytes) -> bytes:
        try:
            answer, output = self._perform(request, payload)
            return pack({"ok": True, **answer}, output)
        except Refused as refused:
            return pack({"ok": False, "error": refused.code, "message": str(refused)[:2000]})


def receive(connection: socket.socket) -> tuple[dict[str, object], bytes] | None:
    """The next frame; None at the end of the stream.

    Raises:
        FrameError: what came is not a frame.
        OSError: the connection broke, or a frame took too long.
    """
    connection.settimeout(None)
    first = connection.recv(1)
    if not first:
        return None
    connection.settimeout(_FRAME_DEADLINE)
    header = first + _exactly(connection, HEADER.size - 1)
    json_length, payload_length = parse_header(header)
    return parse_message(_exactly(connection, json_length)), _exactly(connection, payload_length)


def _exactly(connection: socket.socket, count: int) -> bytes:
    pieces = []
    while count:
        piece = connection.recv(min(count, 1 << 20))
        if not piece:
            raise FrameError("The stream ended inside a frame.")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
