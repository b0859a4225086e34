"""Connections of the host's to ports of this guest: bytes carried between vsock and TCP on the loopback.

The connection that asks for a port becomes that port's own: a thread connects to it on 127.0.0.1, then on
::1, writes the answer, and from then on what comes from one side goes to the other. Who asks gives its place
among the agent's connections back at once, so that nothing that a port does keeps others from the agent.

Theory of operation. One thread, made when it is first needed, has all of them in one epoll. That is
edge-triggered: a connection is told once that something has changed, and goes on until nothing more goes, or
until it is another one's turn. So there is nothing to take back from epoll, and an end that nobody can serve
keeps nobody busy.

Rules that this file keeps:

1. A connection holds at most `_PIECE` bytes each way, and reads when the last ones are gone.
2. The end of one way is passed on once its bytes are; the other way goes on. Who takes no more ends the way
   to it alone; who breaks ends both.
3. There are at most MAX_PORT_CONNECTIONS, and a port has `_PATIENCE` seconds to accept.
4. An error of one connection costs that connection.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections import deque

from agent_protocol import MAX_PORT_CONNECTIONS, pack
from answer import Refused

_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_PATIENCE = 10.0
_PIECE = 1 << 15
_TURN = 16
"""Pieces that go one way before it is another connection's turn."""
_BUFFER = 1 << 16
"""Bytes that Linux buffers in a connection to a port, each way; left alone it would go to megabytes."""
_EVENTS = 64
_EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_GONE = select.EPOLLHUP | select.EPOLLERR
_PAUSE = 0.1


class _Watch:
    """What epoll knows of the connections."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Rung when there is a new connection."""
        self.epoll.register(self.bell, select.EPOLLIN)
        self._connections: dict[int, _Connection] = {}

    def add(self, side: socket.socket, connection: _Connection) -> None:
        """Tells `connection` of what changes on `side`."""
        self.epoll.register(side.fileno(), _EDGES)
        self._connections[side.fileno()] = connection

    def close(self, side: socket.socket) -> None:
        """Closes `side`, of which epoll then knows nothing any more."""
        self._connections.pop(side.fileno(), None)
        side.close()

    def wait(self, seconds: float) -> list[_Connection]:
        """The connections of which something has changed, once it has, or after `seconds` (-1: never)."""
        changed = []
        for fd, changes in self.epoll.poll(seconds, _EVENTS):
            connection = self._connections.get(fd)
            if connection is not None:
                connection.note(fd, changes)
                changed.append(connection)
            elif fd == self.bell:
                os.eventfd_read(fd)
        return changed


class Ports:
    """The connections to this guest's ports."""

    def __init__(self, patience: float = _PATIENCE) -> None:
        """There are none; `patience` is how many seconds a port has to accept one."""
        self._patience = patience
        self._lock = threading.Lock()
        self._count = 0
        self._new: deque[_Connection] = deque()
        self._watch: _Watch | None = None
        """There when the thread is."""

    def __len__(self) -> int:
        """How many there are."""
        return self._count

    def connect(self, port: int, peer: int) -> None:
        """Makes the host's connection `peer`, a descriptor that stays the caller's, one to `port`.

        Returns at once. The answer is written when the port has accepted, or has not.

        Raises:
            Refused: there are too many.
            OSError: there are no descriptors left.
        """
        with self._lock:
            if self._count >= MAX_PORT_CONNECTIONS:
                raise Refused(
                    "failed", f"connect: there are {MAX_PORT_CONNECTIONS} connections, which is the most"
                )
            watch = self._running()
            host = socket.socket(fileno=os.dup(peer))
            host.setblocking(False)
            self._new.append(_Connection(host, port, time.monotonic() + self._patience, watch))
            self._count += 1
        os.eventfd_write(watch.bell, 1)

    def _running(self) -> _Watch:
        """Sees to it that there is a thread."""
        if self._watch is None:
            watch = _Watch()
            try:
                threading.Thread(target=self._work, args=(watch,), daemon=True).start()
            except RuntimeError as error:
                raise Refused("failed", "connect: there is no thread to be had") from error
            self._watch = watch
        return self._watch

    def _work(self, watch: _Watch) -> None:
        """Carries what there is to carry, until the machine ends."""
        waiting: list[_Connection] = []
        ready: deque[_Connection] = deque()
        while True:
            try:
                self._turn(watch, waiting, ready)
            except (OSError, MemoryError):
                time.sleep(_PAUSE)  # of no connection: there is no memory to wait with

    def _turn(self, watch: _Watch, waiting: list[_Connection], ready: deque[_Connection]) -> None:
        """Waits for something to do, and does some of it.

        Args:
            watch: tells of changes.
            waiting: whose ports have not accepted yet.
            ready: who may have something to do; each is there once.
        """
        ready.extend(each for each in watch.wait(0 if ready else _seconds(waiting)) if each not in ready)
        while self._new:
            waiting.append(self._new[0])
            ready.append(self._new.popleft())
        ready.extend(each for each in waiting if each.late and each not in ready)
        for _ in range(len(ready)):
            connection = ready.popleft()
            try:
                more = connection.go_on()
            except (OSError, MemoryError):
                more, connection.over = False, True
            if connection in waiting and (connection.reached or connection.over):
                waiting.remove(connection)
            if connection.over:
                connection.close()
                with self._lock:
                    self._count -= 1
            elif more:
                ready.append(connection)


class _Way:
    """What goes from one side of a connection to the other."""

    def __init__(self, source: socket.socket, sink: socket.socket, first: bytes = b"") -> None:
        """Carries from `source` to `sink`; `first` goes before all else."""
        self._source, self._sink = source, sink
        self._held = memoryview(first)
        self.ended = False
        """Nothing goes this way any more."""

    def carry(self) -> bool:
        """Carries what goes now; whether there may be more at once.

        Raises:
            OSError: the source is broken.
        """
        try:
            for _ in range(_TURN):
                if self.ended or not (self._held or self._read()):
                    return False
                self._held = self._held[self._write() :]
        except BlockingIOError:
            return False
        return True

    def _read(self) -> bool:
        self._held = memoryview(self._source.recv(_PIECE))
        if not self._held:
            self._end(self._sink, socket.SHUT_WR)
        return not self.ended

    def _write(self) -> int:
        try:
            return self._sink.send(self._held)
        except BlockingIOError:
            raise
        except OSError:  # it takes no more
            self._end(self._source, socket.SHUT_RD)
            return len(self._held)

    def _end(self, side: socket.socket, how: int) -> None:
        self.ended = True
        try:
            side.shutdown(how)
        except OSError:
            pass  # it is not connected any more


class _Connection:
    """One connection of the host's to a port, from its request to its end."""

    def __init__(self, host: socket.socket, number: int, deadline: float, watch: _Watch) -> None:
        """Nothing happens before `go_on`.

        Args:
            host: the connection, which is this one's from now on.
            number: of the port.
            deadline: by time.monotonic, until when the port has to accept.
            watch: tells of changes.
        """
        self._host, self._number, self._watch = host, number, watch
        self._port: socket.socket | None = None
        self._addresses = list(_ADDRESSES)
        self._up: _Way | None = None
        self._down: _Way | None = None
        self._gone = False
        self.deadline = deadline
        self.over = False
        """There is nothing left but to close it."""

    @property
    def late(self) -> bool:
        """Whether the time is over in which the port has to accept."""
        return self.deadline <= time.monotonic()

    @property
    def reached(self) -> bool:
        """Whether the port has accepted."""
        return self._up is not None

    def note(self, fd: int, changes: int) -> None:
        """Takes what epoll has told of `fd`."""
        if fd == self._host.fileno() and changes & _GONE:
            self._gone = True

    def go_on(self) -> bool:
        """Does what can be done now; whether there may be more at once.

        Raises:
            OSError: it is broken.
        """
        if self._up is None or self._down is None:
            self._reach()
        if self._up is None or self._down is None:
            return False
        more = [self._up.carry(), self._down.carry()]
        if self._up.ended:
            self.over = self._down.ended or self._nobody_takes()
        return any(more)

    def close(self) -> None:
        """Closes both sides."""
        self._watch.close(self._host)
        if self._port is not None:
            self._watch.close(self._port)

    def _reach(self) -> None:
        """Connects to the port, as far as that goes now."""
        late = self.late
        while self._addresses and not late:
            family, address = self._addresses[0]
            if self._port is None:
                self._port = _side(family)
                self._watch.add(self._port, self)
            outcome = self._port.connect_ex((address, self._number))  # asked again, it says how it went
            if outcome in (0, errno.EISCONN):
                self._up = _Way(self._host, self._port)
                self._down = _Way(self._port, self._host, pack({"ok": True}))
                self._watch.add(self._host, self)
                return
            if outcome in (errno.EINPROGRESS, errno.EALREADY):
                return
            self._watch.close(self._port)
            self._port = None
            del self._addresses[0]
        why = "does not accept connections" if late else "has nobody who listens"
        refusal = {"ok": False, "error": "refused", "message": f"Port {self._number} {why}."}
        self._host.send(pack(refusal))
        self.over = True

    def _nobody_takes(self) -> bool:
        """Whether the host is gone altogether: it sends no more, and what is sent to it is for nobody.

        epoll tells it of a Unix socket; vsock says so when it is to send something, be it nothing.
        """
        try:
            self._host.send(b"")
        except BlockingIOError:
            return False
        except OSError:
            return True
        return self._gone


def _side(family: int) -> socket.socket:
    """A socket that is to be connected to a port."""
    side = socket.socket(family, socket.SOCK_STREAM)
    side.setblocking(False)
    side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    side.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
    side.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
    return side


def _seconds(waiting: list[_Connection]) -> float:
    """Seconds until one of these is late; -1 when there are none."""
    return max(0.0, min(each.deadline for each in waiting) - time.monotonic()) if waiting else -1.0
