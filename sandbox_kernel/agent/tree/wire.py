"""One end of the stream that a tree travels over."""

from __future__ import annotations

import select
import socket
import time

from .form import PIECE, Spoken, WireError


class Wire:
    """One end of the stream: what goes out is gathered, what comes in is read ahead."""

    def __init__(self, connection: socket.socket, seconds: float, heed: bool = False) -> None:
        """The end over `connection`, which stays the caller's.

        Args:
            connection: a connected stream socket.
            seconds: that a record or piece may take.
            heed: whether what comes from the peer while something is sent raises `Spoken`.
        """
        connection.settimeout(seconds)
        self._connection, self._seconds, self._heed = connection, seconds, heed
        self._outgoing, self._incoming = bytearray(), bytearray()

    def put(self, data: bytes | memoryview) -> None:
        """Sends `data`, perhaps later.

        Raises:
            WireError: the peer does not take it.
            Spoken: it says something.
        """
        self._outgoing += data
        if len(self._outgoing) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Sends what was gathered; raises as `put`."""
        if self._heed and _readable(self._connection):
            raise Spoken
        try:
            self._connection.sendall(self._outgoing)
        except OSError as error:
            raise WireError(str(error)) from error
        self._outgoing.clear()

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            WireError: they do not come.
        """
        data = self._incoming
        if len(data) < count:
            self._complete(count)
        taken = bytes(data[:count])
        del data[:count]
        return taken

    def drain(self) -> None:
        """Throws away what comes, until the peer hangs up or is silent for too long."""
        try:
            while self._connection.recv(PIECE):
                pass
        except OSError:
            pass

    def _complete(self, count: int) -> None:
        deadline = time.monotonic() + self._seconds
        while len(self._incoming) < count:
            try:
                data = self._connection.recv(PIECE)
            except OSError as error:
                raise WireError(str(error)) from error
            if not data:
                raise WireError("it hung up")
            self._incoming += data
            if time.monotonic() > deadline and len(self._incoming) < count:
                raise WireError("timed out")


def _readable(connection: socket.socket) -> bool:
    """Whether something has come over `connection`, its end included."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))
