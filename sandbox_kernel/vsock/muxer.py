"""All streams of one VM (virtio 1.2, 5.10.6).

Theory of operation. A stream is known by its two ports. A packet of a known stream goes to its `Connection`;
for any other the answer is RST, unless it is one itself. Guests may not open streams: their REQUEST is such
a packet. What a stream owes the guest waits in one outbox that streams leave and enter in turn.

Rules that this file keeps:

1. Nothing grows by what the guest sends: streams are opened by the host alone (at most `max_streams`), each
   is in the outbox once, and answers to unknown packets wait in a queue of `max_resets`. When that is full
   the muxer is `congested`: no packet may be given to it until the guest has taken answers (5.10.6.1: a
   device whose extra resources are exhausted stops processing its transmit queue).
2. A violation on a stream resets that stream, with one logged line, and nothing else.
3. Streams that wait for the guest's RST to their SHUTDOWN are forgotten, oldest first, when more than
   `max_closing` do; a guest that never answers costs nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from dataclasses import dataclass

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.connection import ENDED, WINDOW, Connection, State, StreamViolation
from sandbox_kernel.vsock.packet import Header

_log = logging.getLogger(__name__)

_FIRST_PORT = 1024
_LAST_PORT = 1 << 31


@dataclass(frozen=True)
class Limits:
    """What one VM's streams may cost the host.

    Attributes:
        max_streams: open streams.
        max_closing: streams whose end the guest has not confirmed.
        max_resets: answers that wait for the guest to take them.
        window: bytes buffered a stream.
    """

    max_streams: int = 256
    max_closing: int = 64
    max_resets: int = 128
    window: int = WINDOW


class Muxer:
    """The streams of one guest, without their bytes."""

    def __init__(self, cid: int, limits: Limits | None = None) -> None:
        """Args: cid is the guest's context id; limits are the defaults when None."""
        self._cid = cid
        self._limits = limits or Limits()
        self._streams: dict[tuple[int, int], Connection] = {}
        self._closing: deque[Connection] = deque()
        self._outbox: deque[Connection] = deque()
        self._resets: deque[Header] = deque()
        self._port = _FIRST_PORT

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def congested(self) -> bool:
        """True while no packet may be received (rule 1)."""
        return len(self._resets) >= self._limits.max_resets

    @property
    def has_control(self) -> bool:
        """True when `next_control` may have something."""
        return bool(self._outbox or self._resets)

    def open(self, guest_port: int) -> Connection:
        """Begin a stream to a port of the guest.

        Raises:
            ConnectionRefusedError: `max_streams` are open.
        """
        if len(self._streams) - len(self._closing) >= self._limits.max_streams:
            raise ConnectionRefusedError(
                f"the VM already has {self._limits.max_streams} vsock streams; close some of them"
            )
        while (self._port, guest_port) in self._streams:
            self._advance()
        connection = Connection(self._cid, self._port, guest_port, self._outbox, self._limits.window)
        self._streams[self._port, guest_port] = connection
        self._advance()
        return connection

    def receive(self, header: Header) -> tuple[Connection, int] | None:
        """Take a packet's header; the caller has made sure that `length` bytes of payload are there.

        Returns:
            The stream and what happened on it (see `Connection.receive`); None when it belongs to none.
        """
        if header.src_cid != self._cid or header.dst_cid != packet.HOST_CID:
            # Not from this guest or not to this host: nobody to answer.
            return None
        key = (header.dst_port, header.src_port)
        connection = self._streams.get(key)
        if connection is None or header.type != packet.STREAM:
            if header.operation != packet.RST:
                self._resets.append(_reset_for(header))
            return None
        try:
            events = connection.receive(header)
        except StreamViolation as violation:
            _log.warning("vsock stream to port %d of CID %d reset: %s", key[1], self._cid, str(violation))
            connection.reset()
            events = ENDED
        if connection.state is State.CLOSED:
            self._forget(connection)
        return connection, events

    def shut(self, connection: Connection, flags: int) -> None:
        """Close directions of a stream (see `Connection.shut`)."""
        before = connection.state
        connection.shut(flags)
        if connection.state is State.CLOSING and before is not State.CLOSING:
            self._closing.append(connection)
            if len(self._closing) > self._limits.max_closing:
                self.reset(self._closing[0])

    def reset(self, connection: Connection) -> None:
        """End a stream by RST."""
        connection.reset()
        self._forget(connection)

    def next_control(self) -> Header | None:
        """The next packet without payload for the guest, None when nothing is owed."""
        if self._resets:
            return self._resets.popleft()
        while self._outbox:
            header = self._outbox.popleft().next_control()
            if header is not None:
                return header
        return None

    def clear(self) -> None:
        """Forget everything: the guest's driver has begun anew or is gone."""
        self._streams.clear()
        self._closing.clear()
        self._outbox.clear()
        self._resets.clear()

    def _forget(self, connection: Connection) -> None:
        self._streams.pop((connection.host_port, connection.guest_port), None)
        if connection in self._closing:
            self._closing.remove(connection)

    def _advance(self) -> None:
        self._port = self._port + 1 if self._port < _LAST_PORT else _FIRST_PORT


def _reset_for(header: Header) -> Header:
    """The RST that answers a packet of no stream."""
    return Header(
        header.dst_cid,
        header.src_cid,
        header.dst_port,
        header.src_port,
        0,
        header.type,
        packet.RST,
        0,
        0,
        0,
    )
