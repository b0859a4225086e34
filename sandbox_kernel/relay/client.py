"""One channel's socket towards the clients: libzmq, driven straight from the event loop.

Theory of operation. libzmq's file descriptor is edge-triggered and stands for both directions: it may become
readable for events that are not ours, and a send may swallow the edge of a message that has come in. So
after each wake-up and after each send the socket is read until it is empty, a bounded number of messages a
turn. A paused socket is not read: messages stay in libzmq's queue and then in the client's; none is lost.

Towards a client that takes nothing, ROUTER and XPUB drop messages for that client alone once
`RelayLimits.client_messages` wait for it, as a kernel's own sockets do; outlet.py bounds the bytes.

A single client can only be cut by its connection's file descriptor, which libzmq tells when it accepts one
(the socket monitor's ACCEPTED event). libzmq may have closed it since, and the number may stand for something
else; so a connection is noted only when it is one of this socket's address, and cut only when it is still the
same (SO_COOKIE). The monitor has to be read all the time: libzmq's own thread stops when nobody does.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

import zmq
from zmq.utils.monitor import recv_monitor_message

from sandbox_kernel.errors import ConfigurationError, HostError, NoSpaceError
from sandbox_kernel.relay.limits import RelayLimits
from sandbox_kernel.relay.outlet import Outlet, Verdict
from sandbox_kernel.relay.zmtp import Frame

log = logging.getLogger(__name__)

SOCKET_TYPES: Final = {
    "control": zmq.ROUTER,
    "shell": zmq.ROUTER,
    "stdin": zmq.ROUTER,
    "hb": zmq.ROUTER,
    "iopub": zmq.XPUB,
}

_TURN: Final = 32
"""Messages read from clients in one turn of the event loop."""

_WITHOUT_COPY: Final = 32 * 1024
"""Frames from this size on are handed to libzmq without a copy; below, copying is cheaper."""

_LOOK: Final = 0.02
"""Seconds between two looks at clients that the guest waits for."""

# Plain integers: with zmq's enumerations, a third of the time of a send goes into adding them up.
_SEND_LAST: Final = int(zmq.NOBLOCK)
_SEND_MORE: Final = int(zmq.NOBLOCK) | int(zmq.SNDMORE)
_EVENTS: Final = int(zmq.EVENTS)
_POLLIN: Final = int(zmq.POLLIN)

_SO_COOKIE: Final = 57
_IPC_PATH_BYTES: Final = 107


@dataclass(frozen=True)
class Curve:
    """The keypair of a CURVE server, Z85."""

    public: bytes
    secret: bytes


class ClientSocket:
    """A bound socket; reads nothing before `start`."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], channel: str, limits: RelayLimits, curve: Curve | None
    ) -> None:
        """A socket for one of Jupyter's channels, to be bound."""
        self._channel = channel
        self._limits = limits
        self._socket = sock = context.socket(SOCKET_TYPES[channel])
        self._path: Path | None = None
        self._port = 0
        self._watcher: asyncio.AbstractEventLoop | None = None
        self._outlet = Outlet(limits.client_bytes, limits.stall)
        self._on_message: Callable[[list[bytes]], None] | None = None
        self._on_stall: Callable[[bool], None] | None = None
        self._paused = False
        self._stalled = False
        self._due = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._connections: dict[int, bytes] = {}
        sock.linger = round(limits.linger * 1000)
        # pyzmq's own threshold is 64 KiB; below it, it copies in silence and says "released" at once.
        sock.copy_threshold = _WITHOUT_COPY
        sock.sndhwm = limits.client_messages
        if curve is not None:
            sock.curve_publickey, sock.curve_secretkey, sock.curve_server = curve.public, curve.secret, True
        if sock.type == zmq.XPUB:
            # Tell of each subscriber, not of each new topic.
            sock.setsockopt(zmq.XPUB_VERBOSE, 1)
        else:
            # A client that reconnects with its old identity gets it, as in ipykernel.
            sock.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._monitor = sock.get_monitor_socket(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)

    def bind(self, address: str) -> None:
        """Binds; a Unix socket gets mode 0600 and takes the place of a stale one.

        Raises:
            ConfigurationError: the address cannot be one.
            HostError: it is taken; NoSpaceError: its file system is full.
        """
        path = ipc_path(address)
        if path is not None:
            _make_room(path)
        # libzmq binds in this call, so no other file is made under this mask by this thread.
        mask = os.umask(0o177)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            if path is not None and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpaceError(
                    f"The {self._channel} channel's socket {path} cannot be made "
                    f"({os.strerror(error.errno)}); make room there or point XDG_RUNTIME_DIR elsewhere."
                ) from error
            raise HostError(
                f"The {self._channel} channel cannot listen at {address} ({error.strerror}); "
                "use another connection file."
            ) from error
        finally:
            os.umask(mask)
        self._path = path
        self._port = _port(self._socket.getsockopt_string(zmq.LAST_ENDPOINT))
        self._watcher = asyncio.get_running_loop()
        self._watcher.add_reader(self._monitor.FD, self._learn_connections)
        self._learn_connections()

    def start(self, on_message: Callable[[list[bytes]], None], on_stall: Callable[[bool], None]) -> None:
        """Reads from now on.

        Args:
            on_message: gets each message; for iopub, each subscription.
            on_stall: told True when the guest has to wait for slow clients, and False when no more.
        """
        self._on_message, self._on_stall = on_message, on_stall
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._socket.FD, self._read)
        self._schedule()

    def pause(self, paused: bool) -> None:
        """Stops reading, or goes on."""
        self._paused = paused
        if not paused:
            self._schedule()

    def send(self, frames: Sequence[Frame]) -> None:
        """Sends a message to the client that its first frame names, or to those subscribed to it."""
        last = len(frames) - 1
        large = False
        try:
            for index, frame in enumerate(frames):
                flags = _SEND_MORE if index < last else _SEND_LAST
                if len(frame) < _WITHOUT_COPY:
                    self._socket.send(frame, flags)
                else:
                    tracker = self._socket.send(frame, flags, copy=False, track=True)
                    assert tracker is not None
                    self._outlet.sent(len(frame), partial(getattr, tracker, "done"))
                    large = True
        except zmq.ZMQError as error:
            log.warning("a message on %s was not sent: %s", self._channel, error)
        if large and not self._stalled:
            self._mind_the_outlet()
        self._schedule()

    def collect(self, limit: int) -> Iterator[list[bytes]]:
        """Messages that wait unread, at most `limit`; for those that nobody will read any more."""
        for _ in range(limit):
            if not self._readable():
                return
            yield self._socket.recv_multipart(zmq.NOBLOCK)

    def close(self) -> None:
        """Stops; what is sent already still reaches its clients within the linger time. Idempotent."""
        if self._socket.closed:
            return
        if self._loop is not None:
            self._loop.remove_reader(self._socket.FD)
            self._loop = None
        if self._watcher is not None:
            self._watcher.remove_reader(self._monitor.FD)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _readable(self) -> bool:
        return bool(cast(int, self._socket.getsockopt(_EVENTS)) & _POLLIN)

    def _schedule(self) -> None:
        if not self._due and self._loop is not None and not self._paused:
            self._due = True
            self._loop.call_soon(self._read_due)

    def _read_due(self) -> None:
        self._due = False
        self._read()

    def _read(self) -> None:
        if self._loop is None or self._on_message is None:
            return
        receive = self._socket.recv_multipart
        for _ in range(_TURN):
            if self._paused or not self._readable():
                return
            self._on_message(receive(zmq.NOBLOCK))
        self._schedule()

    def _mind_the_outlet(self) -> None:
        """Looks whether the guest has to wait, and keeps looking while it does."""
        if self._loop is None or self._on_stall is None:
            return
        verdict = self._outlet.verdict(self._loop.time())
        if verdict is Verdict.CUT:
            self._cut()
        stalled = verdict is not Verdict.FLOW
        if stalled != self._stalled:
            self._stalled = stalled
            self._on_stall(stalled)
        if stalled:
            self._loop.call_later(_LOOK, self._mind_the_outlet)

    def _cut(self) -> None:
        """Cuts the connections whose clients take nothing."""
        count = 0
        for descriptor, cookie in self._connections.items():
            with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
                if _cookie(connection) == cookie and not _writable(connection):
                    connection.shutdown(socket.SHUT_RDWR)
                    count += 1
        log.warning(
            "cut %d client(s) of %s that took nothing for %g s", count, self._channel, self._limits.stall
        )

    def _learn_connections(self) -> None:
        while self._monitor.poll(0):
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
            descriptor = event["value"]
            assert isinstance(descriptor, int)
            self._connections.pop(descriptor, None)
            if event["event"] == zmq.EVENT_ACCEPTED:
                with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
                    if self._is_ours(connection.getsockname()):
                        self._connections[descriptor] = _cookie(connection)

    def _is_ours(self, name: object) -> bool:
        """Whether a connection of this name was accepted at our address."""
        if isinstance(name, tuple):
            return bool(name[1] == self._port)
        return self._path is not None and name == str(self._path)


def ipc_path(address: str) -> Path | None:
    """The Unix socket's file of a ZMQ address; None when it has none."""
    if not address.startswith("ipc://") or address.startswith("ipc://@"):
        return None
    return Path(address.removeprefix("ipc://"))


def _port(endpoint: str) -> int:
    """The port of a tcp endpoint, else 0."""
    return int(endpoint.rpartition(":")[2]) if endpoint.startswith("tcp://") else 0


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """A socket object for a connection that stays libzmq's; OSError when it is no socket any more."""
    copy = os.dup(descriptor)
    try:
        connection = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
    with connection:
        yield connection


def _writable(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(0))


def _cookie(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)


def _make_room(path: Path) -> None:
    if len(os.fsencode(path)) > _IPC_PATH_BYTES:
        raise ConfigurationError(
            f"The socket path {path} is longer than {_IPC_PATH_BYTES} bytes; use a shorter folder."
        )
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"{path} is in the way of a socket and is no socket; remove it.")
    path.unlink()
