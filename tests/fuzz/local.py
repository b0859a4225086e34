"""epoll and local sockets without a kernel, for the vsock device: repeatable, and as full as one likes.

`Poll` is epoll's edge-triggered half: what became ready since it was told is told once, and `modify` tells
again. `Local` is the device's end of a socketpair; its `peer_…` methods are what the peer does. File numbers
are given out as Linux does, the lowest free one first, so that a number left behind is found out.
"""

from __future__ import annotations

import errno
import select
import socket
from typing import Protocol

_TAIL = 8192
_ALWAYS = select.EPOLLHUP | select.EPOLLERR
_FIRST = 10
_PATTERN = bytes(range(251)) * 50


def pattern(start: int, count: int) -> bytes:
    """Bytes that differ from their neighbours: `count` of what goes on for ever, from `start` on."""
    start %= 251
    return _PATTERN[start : start + count]


class Watched(Protocol):
    def events(self) -> int: ...


class Bell:
    """A doorbell that has been rung."""

    def events(self) -> int:
        return select.EPOLLIN


class Files:
    """Which numbers are open, and for what."""

    def __init__(self) -> None:
        self.open: dict[int, Watched] = {}

    def add(self, what: Watched) -> int:
        number = _FIRST
        while number in self.open:
            number += 1
        self.open[number] = what
        return number


class Poll:
    """What stands for `select.epoll`."""

    def __init__(self, files: Files) -> None:
        self.closed = False
        self._files = files
        self._masks: dict[int, int] = {}
        self._edges: dict[int, None] = {}

    def fileno(self) -> int:
        return 3

    def register(self, number: int, mask: int) -> None:
        assert not self.closed and number in self._files.open and number not in self._masks
        self._masks[number] = mask
        self._edges[number] = None

    def modify(self, number: int, mask: int) -> None:
        assert not self.closed and number in self._masks
        self._masks[number] = mask
        self._edges[number] = None

    def unregister(self, number: int) -> None:
        assert not self.closed and number in self._files.open
        del self._masks[number]
        self._edges.pop(number, None)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        assert not self.closed and timeout == 0
        told: list[tuple[int, int]] = []
        for number in list(self._edges)[:most] if self._edges else ():
            del self._edges[number]
            events = self._files.open[number].events() & (self._masks[number] | _ALWAYS)
            if events:
                told.append((number, events))
        return told

    def close(self) -> None:
        self.closed = True

    def edge(self, number: int) -> None:
        """Something has happened to that file."""
        if number in self._masks:
            self._edges[number] = None

    def watches(self, number: int) -> bool:
        return number in self._masks


class Local:
    """The device's end of a pair of stream sockets."""

    def __init__(self, files: Files, poll: Poll, room: int) -> None:
        self._files = files
        self._poll = poll
        self.number = files.add(self)
        self.room = room
        """Bytes that fit until the peer reads."""
        self.tail = b""
        """The last that the device has sent."""
        self._sent = self._read = 0
        self._peer_done = self._peer_gone = self._done = self._deaf = False

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def fileno(self) -> int:
        return self.number

    def send(self, data: memoryview | bytes) -> int:
        self._alive()
        if self._peer_gone or self._done:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")
        count = min(len(data), self.room)
        if not count and len(data):
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        self.room -= count
        self.tail = (self.tail + bytes(data[:count]))[-_TAIL:]
        return count

    def recv_into(self, buffer: memoryview) -> int:
        self._alive()
        assert len(buffer), "a read of nothing looks like the end"
        if self._read < self._sent:
            count = min(len(buffer), self._sent - self._read)
            buffer[:count] = pattern(self._read, count)
            self._read += count
            return count
        if self._peer_done or self._peer_gone or self._deaf:
            return 0
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    def shutdown(self, how: int) -> None:
        self._alive()
        if self._peer_gone:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")
        if how == socket.SHUT_WR:
            self._done = True
        else:
            self._deaf = True
        self._poll.edge(self.number)

    def close(self) -> None:
        self._alive()
        assert not self._poll.watches(self.number)
        del self._files.open[self.number]
        self.number = -1

    def events(self) -> int:
        events = select.EPOLLOUT if self.room else 0
        ended = self._peer_done or self._peer_gone or self._deaf
        if self._read < self._sent or ended:
            events |= select.EPOLLIN
        if ended:
            events |= select.EPOLLRDHUP
        if self._peer_gone or (ended and self._done):
            events |= select.EPOLLHUP
        return events

    def peer_sends(self, count: int) -> None:
        """At most as much as fits."""
        if not (self._peer_done or self._peer_gone or self._deaf or self.number < 0):
            self._sent += min(count, 10_000 + self._read - self._sent)
            self._poll.edge(self.number)

    def peer_reads(self, count: int) -> None:
        if self.number >= 0:
            self.room += count
            self._poll.edge(self.number)

    def peer_ends(self) -> None:
        """It sends no more."""
        self._peer_done = True
        if self.number >= 0:
            self._poll.edge(self.number)

    def peer_goes(self) -> None:
        self._peer_gone = True
        if self.number >= 0:
            self._poll.edge(self.number)

    def _alive(self) -> None:
        assert self.number >= 0, "a closed socket is used"
