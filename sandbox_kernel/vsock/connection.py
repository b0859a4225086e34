"""The state of one stream between the host and the guest (virtio 1.2, 5.10.6.3 to 5.10.6.5).

Theory of operation. No bytes pass through here: this is bookkeeping over headers, and whoever moves the
bytes tells it what was moved.

Opening: the host sends REQUEST; the guest answers RESPONSE, or RST.

Credit: each side tells in every header how much it can buffer (`buf_alloc`) and how much its application has
taken (`fwd_cnt`). A sender keeps `sent - fwd_cnt <= buf_alloc`. Our own window is fixed. Since every header
that we send carries our `fwd_cnt`, a CREDIT_UPDATE of its own is sent only when half of the window has been
taken since the last header. The window that counts is the smaller of ours and the guest's: newer Linux
guests send no further ahead than their own buffer, whatever we grant.

Half-close: SHUTDOWN with SEND says "I send no more", with RECEIVE "I take no more"; flags add up. Whoever
receives the second of the two answers RST, and with that the stream is forgotten. When both flags are ours
we wait for that RST (`CLOSING`); when both are the guest's, the RST is ours to send (`CLOSED`).

    CONNECTING ──RESPONSE──▶ OPEN ──both flags sent──▶ CLOSING ──RST──▶ CLOSED
         └──────RST, violation, both flags received──────────────────────▲

Rules that this file keeps:

1. `_move` is the only place where the state changes, along `_MOVES`.
2. What a guest may not do on a stream raises `StreamViolation`; the stream is then to be reset. Nothing else
   is raised for what a guest sent.
3. Counters are Python's unbounded integers; only headers are modulo 2**32.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final

from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.packet import Header

WINDOW: Final = 256 * 1024
"""Bytes of one stream that the host buffers at most (our `buf_alloc`). Linux guests have the same default."""

_MODULUS: Final = 1 << 32
_HALF: Final = 1 << 31

# What `receive` reports, as a sum.
OPENED: Final = 1
"""The guest accepted the stream."""
DATA: Final = 2
"""The packet's payload is to be delivered, and `delivered` to be called as that happens."""
PEER_DONE: Final = 4
"""The guest sends no more."""
PEER_DEAF: Final = 8
"""The guest takes no more."""
ENDED: Final = 16
"""The stream is over; what was received before is still good."""

# What a stream owes the guest, as a sum.
_OWE_REQUEST: Final = 1
_OWE_SHUTDOWN: Final = 2
_OWE_CREDIT: Final = 4
_OWE_RESET: Final = 8


class StreamViolation(Exception):
    """The guest broke the rules on one stream, which has to be reset. Never leaves `sandbox_kernel.vsock`."""


class State(enum.Enum):
    """Where a stream is; see the module's picture."""

    CONNECTING = "connecting"
    OPEN = "open"
    CLOSING = "closing"
    CLOSED = "closed"


_MOVES: Final = {
    State.CONNECTING: {State.OPEN, State.CLOSING, State.CLOSED},
    State.OPEN: {State.CLOSING, State.CLOSED},
    State.CLOSING: {State.CLOSED},
    State.CLOSED: set[State](),
}


class Connection:
    """One stream that the host opened, as flow control and state see it."""

    __slots__ = (
        "_cid",
        "_due",
        "_outbox",
        "_peer_fwd",
        "_peer_shutdown",
        "_peer_window",
        "_received",
        "_sent",
        "_shutdown",
        "_state",
        "_taken",
        "_told",
        "_window",
        "guest_port",
        "host_port",
    )

    def __init__(
        self, cid: int, host_port: int, guest_port: int, outbox: deque[Connection], window: int = WINDOW
    ) -> None:
        """Begin to connect: a REQUEST is owed at once.

        Args:
            cid: the guest's context id.
            host_port: the port that the guest sees as ours.
            guest_port: the port to reach.
            outbox: where the stream puts itself when it owes the guest a packet (see `next_control`).
            window: bytes that the host buffers for it.
        """
        self.host_port = host_port
        self.guest_port = guest_port
        self._cid = cid
        self._outbox = outbox
        self._window = window
        self._state = State.CONNECTING
        self._sent = 0
        self._peer_fwd = 0
        self._peer_window = 0
        self._received = 0
        self._taken = 0
        self._told = 0
        self._shutdown = 0
        self._peer_shutdown = 0
        self._due = 0
        self._owe(_OWE_REQUEST)

    @property
    def state(self) -> State:
        """Where the stream is."""
        return self._state

    @property
    def undelivered(self) -> int:
        """Bytes received and not yet delivered; never more than the window."""
        return self._received - self._taken

    def credit(self) -> int:
        """Bytes that may still be sent to the guest on this stream.

        The guest's window less what is in flight (virtio 1.2, 5.10.6.3); 0 unless the stream is open in this
        direction. Never negative: a guest that shrinks its window below what is in flight has 0.
        """
        if self._state is not State.OPEN or self._shutdown & packet.SHUTDOWN_SEND:
            return 0
        free = self._peer_window - (self._sent - self._peer_fwd)
        return free if free > 0 else 0

    def receive(self, header: Header) -> int:
        """Take a header of this stream.

        Returns:
            The sum of OPENED, DATA, PEER_DONE, PEER_DEAF and ENDED that holds, or 0.

        Raises:
            StreamViolation: rule 2.
        """
        if self._state is State.CLOSED:
            return 0
        operation = header.operation
        if operation == packet.RST:
            self._end(owed=0)
            return ENDED
        self._take_credit(header)
        if operation == packet.RW:
            return self._take_data(header.length)
        if header.length:
            raise StreamViolation(f"a packet of operation {operation} has a payload")
        if operation == packet.CREDIT_UPDATE:
            return 0
        if operation == packet.RESPONSE:
            if self._state is State.CLOSING:
                return 0
            if self._state is not State.CONNECTING:
                raise StreamViolation("a second RESPONSE")
            self._move(State.OPEN)
            return OPENED
        if self._state is State.CONNECTING:
            raise StreamViolation(f"operation {operation} before RESPONSE")
        if operation == packet.CREDIT_REQUEST:
            self._owe(_OWE_CREDIT)
            return 0
        if operation == packet.SHUTDOWN:
            return self._take_shutdown(header.flags)
        raise StreamViolation(f"unknown operation {operation}")

    def data_header(self, length: int) -> Header:
        """The header for `length` bytes, at most `credit()`, that go to the guest now; counts them."""
        self._sent += length
        return self._header(packet.RW, length, 0)

    def delivered(self, count: int) -> None:
        """Note that the local side has taken `count` bytes of what was received."""
        self._taken += count
        window = min(self._window, self._peer_window)
        if self._taken - self._told >= max(1, window // 2) and self._state is State.OPEN:
            self._owe(_OWE_CREDIT)

    def shut(self, flags: int) -> None:
        """Close our directions: SHUTDOWN_SEND, SHUTDOWN_RECEIVE or both. They add up over calls."""
        flags |= self._shutdown
        if flags == self._shutdown or self._state in (State.CLOSING, State.CLOSED):
            return
        self._shutdown = flags
        self._owe(_OWE_SHUTDOWN)
        if flags == packet.SHUTDOWN_BOTH:
            self._move(State.CLOSING)

    def reset(self) -> None:
        """End the stream at once by RST."""
        if self._state is not State.CLOSED:
            self._end(owed=_OWE_RESET)

    def next_control(self) -> Header | None:
        """The packet without payload that is owed first, None when it has lapsed.

        It is called for each time the stream is in the outbox, and puts it there again when more is owed.
        """
        due = self._due
        header = None
        if due & _OWE_RESET:
            due = 0
            header = self._header(packet.RST, 0, 0)
        elif due & _OWE_REQUEST:
            due ^= _OWE_REQUEST
            header = self._header(packet.REQUEST, 0, 0)
        elif due & _OWE_SHUTDOWN:
            # It carries the credit, too.
            due &= ~(_OWE_SHUTDOWN | _OWE_CREDIT)
            header = self._header(packet.SHUTDOWN, 0, self._shutdown)
        elif due & _OWE_CREDIT:
            due = 0
            header = self._header(packet.CREDIT_UPDATE, 0, 0)
        self._due = due
        if due:
            self._outbox.append(self)
        return header

    def _header(self, operation: int, length: int, flags: int) -> Header:
        self._told = self._taken
        return Header(
            packet.HOST_CID,
            self._cid,
            self.host_port,
            self.guest_port,
            length,
            packet.STREAM,
            operation,
            flags,
            self._window,
            self._taken % _MODULUS,
        )

    def _take_credit(self, header: Header) -> None:
        """Learn the guest's window and how much it has taken.

        Threads of the guest may queue packets in another order than they filled in the headers, so that an
        older `fwd_cnt` after a newer one is honest and says nothing new.
        """
        if (header.fwd_cnt - self._sent - 1) % _MODULUS < _HALF:
            raise StreamViolation("the guest took bytes that were never sent")
        forward = (header.fwd_cnt - self._peer_fwd) % _MODULUS
        if forward <= self._sent - self._peer_fwd:
            self._peer_fwd += forward
        self._peer_window = header.buf_alloc

    def _take_data(self, length: int) -> int:
        if self._state is State.CONNECTING:
            raise StreamViolation("data before RESPONSE")
        if self._peer_shutdown & packet.SHUTDOWN_SEND:
            raise StreamViolation("data after SHUTDOWN")
        self._received += length
        if self._received - self._told > self._window:
            raise StreamViolation(f"more data than the credit of {self._window} bytes")
        if self._state is State.CLOSING or self._shutdown & packet.SHUTDOWN_RECEIVE:
            # It was on its way when we stopped listening.
            self._taken += length
            return 0
        return DATA

    def _take_shutdown(self, flags: int) -> int:
        fresh = flags & packet.SHUTDOWN_BOTH & ~self._peer_shutdown
        self._peer_shutdown |= fresh
        events = 0
        if fresh & packet.SHUTDOWN_SEND:
            events |= PEER_DONE
        if fresh & packet.SHUTDOWN_RECEIVE:
            events |= PEER_DEAF
        if self._peer_shutdown == packet.SHUTDOWN_BOTH:
            self._end(owed=_OWE_RESET)
            events |= ENDED
        return events

    def _end(self, owed: int) -> None:
        """Nothing but `owed` is owed any more; the stream stays where it is in the outbox."""
        self._move(State.CLOSED)
        if owed:
            self._owe(owed)
        self._due = owed

    def _owe(self, what: int) -> None:
        if not self._due:
            self._outbox.append(self)
        self._due |= what

    def _move(self, state: State) -> None:
        if state not in _MOVES[self._state]:
            raise AssertionError(f"a stream cannot move from {self._state} to {state}")
        self._state = state
