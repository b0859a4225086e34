"""Serves the agent's protocol: a thread a connection, at most MAX_CONNECTIONS, one request at a time on each.

Rules. Between frames a connection may be silent for ever; a frame that has begun must be complete in
`_FRAME_SECONDS`, and an answer taken in the same time, or the connection is closed. Nothing that one
connection does, nor a lack of threads or descriptors, ends the thread that accepts.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable

from agent_protocol import HEADER, MAX_CONNECTIONS, FrameError, pack, parse_header, parse_message
from answer import Answer, Refused

Perform = Callable[[dict[str, object], bytes, int], Answer]

_FRAME_SECONDS = 30.0
_FAREWELL = 1.0
"""Seconds that a caller has to take its answer and hang up, when the machine ends after it."""
_PAUSE = 0.1
_LONGEST_MESSAGE = 2000


class Server:
    """Accepts connections and answers requests until the machine ends."""

    def __init__(
        self,
        listener: socket.socket,
        perform: Perform,
        host: int | None,
        frame_seconds: float = _FRAME_SECONDS,
    ) -> None:
        """Serves `listener`; with `host` given, only connections from that CID."""
        self._listener = listener
        self._perform = perform
        self._host = host
        self._frame_seconds = frame_seconds
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)

    def serve_forever(self) -> None:
        """Accepts until the listener is closed; a connection too many is closed at once."""
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return
                time.sleep(_PAUSE)  # no descriptors or memory left: the connection waits in the backlog
                continue
            if self._host is not None and peer[0] != self._host:
                connection.close()
            else:
                self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        if not self._places.acquire(blocking=False):
            connection.close()
            return
        try:
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
        except (RuntimeError, MemoryError):  # no thread to be had
            self._places.release()
            connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                while (frame := receive(connection, self._frame_seconds)) is not None:
                    afterwards = self._reply(connection, *frame)
                    if afterwards is not None:
                        _await_end(connection)
                        afterwards()
        except (OSError, FrameError, MemoryError):
            pass  # the host is gone or does not speak the protocol: this connection is over
        finally:
            self._places.release()

    def _reply(
        self, connection: socket.socket, request: dict[str, object], payload: bytes
    ) -> Callable[[], None] | None:
        afterwards = None
        try:
            answer = self._perform(request, payload, connection.fileno())
            frame, afterwards = pack({"ok": True, **answer.fields}, answer.payload), answer.afterwards
        except Refused as refused:
            message = str(refused)[:_LONGEST_MESSAGE]
            frame = pack({"ok": False, "error": refused.code, "message": message})
        connection.settimeout(self._frame_seconds)
        connection.sendall(frame)
        return afterwards


def receive(connection: socket.socket, frame_seconds: float) -> tuple[dict[str, object], bytes] | None:
    """The next frame; None at the end of the stream.

    Raises:
        FrameError: what came is not a frame.
        OSError: the connection broke, or a frame took longer than `frame_seconds`.
    """
    connection.settimeout(None)
    first = connection.recv(1)
    if not first:
        return None
    deadline = time.monotonic() + frame_seconds
    header = first + _exactly(connection, HEADER.size - 1, deadline)
    json_length, payload_length = parse_header(header)
    return (
        parse_message(_exactly(connection, json_length, deadline)),
        _exactly(connection, payload_length, deadline),
    )


def _exactly(connection: socket.socket, count: int, deadline: float) -> bytes:
    pieces = []
    while count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("a frame took too long")
        connection.settimeout(left)
        piece = connection.recv(min(count, 1 << 18))
        if not piece:
            raise FrameError("The stream ended inside a frame.")
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _await_end(connection: socket.socket) -> None:
    """Waits until the peer has hung up, for a moment only."""
    connection.settimeout(_FAREWELL)
    try:
        connection.recv(1)
    except OSError:
        pass
