"""The local end of one vsock stream: a socket, and the bytes that it could not take yet.

Theory of operation. Bytes from the guest go to the socket directly from guest memory; what the socket does
not accept is copied to the backlog, which the guest's credit bounds, and sent when epoll reports room. Epoll
is edge-triggered, so that readiness is remembered here: `readable` is true until a read would block. Room to
write is asked for only while there is a backlog; otherwise each read by the local peer would wake us.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Final

from sandbox_kernel.vsock.connection import Connection

_LISTEN: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_CHUNK: Final = 256 * 1024

Answer = Callable[[bool], None]
"""Told once whether the guest accepted the stream."""


class LocalStream:
    """One local socket and its part of the stream's state."""

    __slots__ = (
        "_answer",
        "_epoll",
        "_socket",
        "backlog",
        "connection",
        "eof",
        "fd",
        "hung_up",
        "lost",
        "peer_done",
        "queued",
        "readable",
    )

    def __init__(
        self, connection: Connection, sock: socket.socket, epoll: select.epoll, answer: Answer
    ) -> None:
        """Take over `sock` and watch it.

        Args:
            connection: the stream's bookkeeping.
            sock: a connected stream socket, from now on the stream's.
            epoll: where to watch it.
            answer: who wants to know whether the guest accepts.
        """
        sock.setblocking(False)
        self.connection = connection
        self.fd = sock.fileno()
        self.backlog = bytearray()
        self.readable = True
        """A read may give something."""
        self.queued = False
        """It is in the device's queue of streams with something to send to the guest."""
        self.eof = False
        """The local peer sends no more."""
        self.hung_up = False
        """The local peer is gone: it neither sends nor takes."""
        self.lost = False
        """Bytes from the guest are thrown away: the local peer takes no more."""
        self.peer_done = False
        """The guest sends no more."""
        self._socket = sock
        self._epoll = epoll
        self._answer: Answer | None = answer
        epoll.register(self.fd, _LISTEN)

    def deliver(self, data: bytes | memoryview) -> int:
        """Bring bytes of the guest to the local peer, as many as go now; the others wait.

        Returns:
            Bytes that need no buffer any more.
        """
        if self.lost:
            return len(data)
        if self.backlog:
            self.backlog += data
            return 0
        try:
            sent = self._socket.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.lost = True
            return len(data)
        if sent < len(data):
            self.backlog += data[sent:]
            self._epoll.modify(self.fd, _LISTEN | select.EPOLLOUT)
        return sent

    def flush(self) -> int:
        """Send of the backlog what goes now; bytes that need no buffer any more."""
        count = 0
        try:
            with memoryview(self.backlog) as waiting:
                while count < len(waiting):
                    count += self._socket.send(waiting[count : count + _CHUNK])
        except BlockingIOError:
            pass
        except OSError:
            self.lost = True
            count = len(self.backlog)
        del self.backlog[:count]
        if not self.backlog:
            self._epoll.modify(self.fd, _LISTEN)
        return count

    def read_into(self, buffer: memoryview) -> int:
        """Read from the local peer: bytes read, 0 at the end or when nothing is there (see `readable`)."""
        try:
            count = self._socket.recv_into(buffer)
        except BlockingIOError:
            self.readable = False
            return 0
        except OSError:
            count = 0
            self.hung_up = True
        if not count:
            self.readable = False
            self.eof = True
        return count

    def finish(self) -> None:
        """Tell the local peer that the guest sends no more."""
        self._shutdown(socket.SHUT_WR)

    def refuse(self) -> None:
        """Tell the local peer that the guest takes no more, and drop what it has sent."""
        self.readable = False
        self.eof = True
        self._shutdown(socket.SHUT_RD)

    def answer(self, accepted: bool) -> None:
        """Pass the guest's answer on, the first time."""
        if self._answer is not None:
            told, self._answer = self._answer, None
            told(accepted)

    def close(self) -> None:
        """Close the socket; a stream that was not accepted is refused by that."""
        if self.fd >= 0:
            self._epoll.unregister(self.fd)
            self._socket.close()
            self.fd = -1
            self.backlog.clear()
            self.answer(False)

    def _shutdown(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            # The local peer is already gone.
            pass
