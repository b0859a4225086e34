"""Serves the agent's protocol: a thread a connection, at most MAX_CONNECTIONS, one request at a time on each.

Every thread accepts a connection, serves it to its end, and accepts the next one. Whoever takes a connection
sees to it that somebody else goes on accepting: a thread that waits already (a template has some, so that
none needs to be made after a restore), or a new one. With all places taken, the last one turns callers away.

Rules. Between frames a connection may be silent for ever; a frame that has begun must be complete in
`_FRAME_SECONDS`, and an answer taken in the same time, or the connection is closed. Nothing that one
connection does, nor a lack of threads or descriptors, keeps others from being accepted.
"""

from __future__ import annotations

import errno
import socket
import threading
import time
from collections.abc import Callable

from agent_protocol import HEADER, MAX_CONNECTIONS, FrameError, pack, parse_header, parse_message
from answer import Answer, Copy, Refused

Perform = Callable[[dict[str, object], bytes, int], Answer | None]
"""The answer to a request; None when its connection is not for requests any more."""

_FRAME_SECONDS = 30.0
_FAREWELL = 1.0
"""Seconds that a caller has to take its answer and hang up, when the machine ends after it."""
_PAUSE = 0.1
_LONGEST_MESSAGE = 2000
_PIECE = 1 << 18
_REQUEST = 1 << 14
"""Bytes that hold nearly every request. (Memory for more is mapped and unmapped each time.)"""
_SPARE = 3
"""Threads that stay to accept, at most; more have been needed for a moment only."""


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
        self._lock = threading.Lock()
        self._accepting = 0
        self._serving = 0

    def start(self) -> None:
        """Has one more thread serve.

        Raises:
            RuntimeError, MemoryError: there is none to be had.
        """
        with self._lock:
            self._start()

    def serve_forever(self) -> None:
        """The same in this thread; returns when the listener is closed, or when others are enough."""
        with self._lock:
            self._accepting += 1
        self._work()

    def _start(self) -> None:
        self._accepting += 1
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except BaseException:
            self._accepting -= 1
            raise

    def _work(self) -> None:
        while True:
            try:
                connection, peer = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EBADF, errno.EINVAL):
                    return  # closed, for all of them
                time.sleep(_PAUSE)  # no descriptors or memory left: the connection waits in the backlog
                continue
            if (self._host is not None and peer[0] != self._host) or not self._take_place():
                connection.close()
                continue
            self.serve(connection)
            with self._lock:
                self._serving -= 1
                if self._accepting >= _SPARE:
                    return
                self._accepting += 1

    def _take_place(self) -> bool:
        """Turns this thread from one that accepts into one that serves, if another one can accept."""
        with self._lock:
            if self._serving == MAX_CONNECTIONS:
                return False
            if self._accepting == 1:
                try:
                    self._start()
                except (RuntimeError, MemoryError):  # no thread to be had
                    return False
            self._accepting -= 1
            self._serving += 1
            return True

    def serve(self, connection: socket.socket) -> None:
        """Answers what comes over one connection, in this thread, until it ends; closes it."""
        try:
            with connection:
                incoming = Incoming(connection, self._frame_seconds)
                while (frame := incoming.frame()) is not None:
                    going_on, afterwards = self._reply(connection, *frame)
                    if not going_on:
                        return
                    if afterwards is not None:
                        _await_end(connection)
                        afterwards()
        except (OSError, FrameError, MemoryError):
            pass  # the host is gone or does not speak the protocol: this connection is over

    def _reply(
        self, connection: socket.socket, request: dict[str, object], payload: bytes
    ) -> tuple[bool, Callable[[], None] | None]:
        """Answers; whether the connection goes on, and what is to be called when the answer has been had."""
        afterwards = None
        try:
            answer = self._perform(request, payload, connection.fileno())
            if answer is None:
                return False, None
            if answer.copy is not None:
                self._copy(connection, answer.copy)
                return False, None
            frame, afterwards = pack({"ok": True, **answer.fields}, answer.payload), answer.afterwards
        except Refused as refused:
            message = str(refused)[:_LONGEST_MESSAGE]
            frame = pack({"ok": False, "error": refused.code, "message": message})
        send(connection, frame, self._frame_seconds)
        return True, afterwards

    def _copy(self, connection: socket.socket, copy: Copy) -> None:
        """Grants a copy, which takes the connection until its end."""
        try:
            send(connection, pack({"ok": True}), self._frame_seconds)
            copy.run(connection)
        finally:
            copy.close()


class Incoming:
    """The frames that come over a blocking connection: most of them whole, so one system call each."""

    def __init__(self, connection: socket.socket, frame_seconds: float) -> None:
        self._connection = connection
        self._frame_seconds = frame_seconds
        self._data = bytearray()
        """What has come and is not part of a frame that was given out."""

    def frame(self) -> tuple[dict[str, object], bytes] | None:
        """The next one; None at the end of the stream.

        Raises:
            FrameError: what came is not a frame.
            OSError: the connection broke, or a frame took too long.
        """
        data = self._data
        if not data:
            data += self._connection.recv(_REQUEST)
            if not data:
                return None
        deadline = time.monotonic() + self._frame_seconds
        body = HEADER.size
        self._complete(body, deadline)
        json_length, payload_length = parse_header(bytes(data[:body]))
        end = body + json_length + payload_length
        self._complete(end, deadline)
        message, payload = bytes(data[body : end - payload_length]), bytes(data[end - payload_length : end])
        del data[:end]
        return parse_message(message), payload

    def _complete(self, count: int, deadline: float) -> None:
        """Sees to it that there are `count` bytes."""
        if len(self._data) >= count:
            return
        try:
            while len(self._data) < count:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("a frame took too long")
                self._connection.settimeout(left)
                piece = self._connection.recv(min(count - len(self._data), _PIECE))
                if not piece:
                    raise FrameError("The stream ended inside a frame.")
                self._data += piece
        finally:
            self._connection.settimeout(None)


def send(connection: socket.socket, frame: bytes, seconds: float) -> None:
    """Sends a frame, at once if it fits into the connection's buffer.

    Raises:
        OSError: the connection broke, or the peer did not take it in `seconds`.
    """
    try:
        sent = connection.send(frame, socket.MSG_DONTWAIT)
    except BlockingIOError:
        sent = 0
    if sent < len(frame):
        connection.settimeout(seconds)
        connection.sendall(memoryview(frame)[sent:])
        connection.settimeout(None)


def _await_end(connection: socket.socket) -> None:
    """Waits until the peer has hung up, for a moment only."""
    connection.settimeout(_FAREWELL)
    try:
        connection.recv(1)
    except OSError:
        pass
