"""One channel's connection to the guest: zmtp.py on an asyncio transport.

Theory of operation. One read a turn of the event loop, of at most 64 KiB unless a large frame is under way:
so no channel keeps another from its turn, and control gets through while iopub floods. Nothing is queued:
a message goes to `on_message` in the turn in which its last byte came. Who cannot take more pauses the
connection, and the guest waits.

A connection that breaks before its handshake's end is tried again (the kernel has not bound yet); one that
ends later is over, and the caller learns it from `closed`.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from sandbox_kernel.agent.protocol import RELAY_IDENTITY
from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.relay import zmtp
from sandbox_kernel.relay.zmtp import Frame, LeftOut

Dial = Callable[[str], Awaitable[socket.socket]]
"""Gives a connected, non-blocking stream socket to the channel of that name; OSError while there is none."""


@dataclass(frozen=True)
class Role:
    """What the two sides of a channel are: our socket type, and those that the guest's may be."""

    ours: str
    theirs: frozenset[str]


ROLES: Final = {
    "control": Role("DEALER", frozenset({"ROUTER"})),
    "shell": Role("DEALER", frozenset({"ROUTER"})),
    "stdin": Role("DEALER", frozenset({"ROUTER"})),
    "iopub": Role("SUB", frozenset({"PUB", "XPUB"})),
}


@dataclass(frozen=True)
class Listener:
    """Who hears of a channel's events; none of these may raise."""

    message: Callable[[list[Frame]], None]
    left_out: Callable[[LeftOut], None]
    writable: Callable[[bool], None]
    broken: Callable[[GuestProtocolError], None]


class GuestChannel(asyncio.BufferedProtocol):
    """One connection, from connecting to its end."""

    def __init__(self, channel: str, bounds: zmtp.Bounds, unread_bytes: int, listener: Listener) -> None:
        """A connection not made yet; see `connect`.

        Args:
            channel: shell, control, …
            bounds: of one message.
            unread_bytes: that may wait for the guest before `listener.writable(False)`.
            listener: who hears.
        """
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[bool] = loop.create_future()
        """True when the handshake is done, False when the connection ended before."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Resolved at the connection's end, when all that the guest has sent is taken."""
        self.name = channel
        """The channel's: shell, control, …"""
        self._reader = zmtp.Reader(channel, ROLES[channel].theirs, bounds)
        self._unread_bytes = unread_bytes
        self._listener = listener
        self._transport: asyncio.Transport | None = None

    def send(self, frames: Sequence[Frame]) -> None:
        """Sends a message to the guest; nothing happens when the connection is over."""
        if self._transport is not None and not self._transport.is_closing():
            for piece in zmtp.encode(frames):
                self._transport.write(piece)

    def bound(self, bounds: zmtp.Bounds) -> None:
        """Has other bounds hold for the messages to come."""
        self._reader.bounds = bounds

    def pause(self, paused: bool) -> None:
        """Lets the guest wait, or go on."""
        if self._transport is None or self._transport.is_closing():
            return
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def close(self) -> None:
        """Ends the connection now; idempotent."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(high=self._unread_bytes)
        transport.write(zmtp.greeting())

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        if not self.ready.done():
            self.ready.set_result(False)
        if not self.closed.done():
            self.closed.set_result(None)

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio's."""
        return self._reader.space()

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio's."""
        greeted = self._reader.greeted
        try:
            messages = self._reader.received(nbytes)
        except GuestProtocolError as error:
            self.close()
            self._listener.broken(error)
            return
        if self._reader.greeted and not greeted and self._transport is not None:
            self._transport.write(zmtp.ready(ROLES[self.name].ours, RELAY_IDENTITY))
        for message in messages:
            if isinstance(message, LeftOut):
                self._listener.left_out(message)
            else:
                self._listener.message(message)
        if self._reader.ready and not self.ready.done():
            self.ready.set_result(True)

    def eof_received(self) -> bool:
        """asyncio's: the guest sends no more, and who sends no more reads no more."""
        self.close()
        return True

    def pause_writing(self) -> None:
        """asyncio's."""
        self._listener.writable(False)

    def resume_writing(self) -> None:
        """asyncio's."""
        self._listener.writable(True)


async def connect(make: Callable[[], GuestChannel], dial: Dial, retry: float) -> GuestChannel:
    """Dials the guest's channel until its handshake succeeds.

    Args:
        make: gives a new channel for each attempt.
        dial: connects.
        retry: seconds between two attempts.
    """
    loop = asyncio.get_running_loop()
    while True:
        channel = make()
        try:
            connection = await dial(channel.name)
            await loop.create_connection(partial(_itself, channel), sock=connection)
            if await channel.ready:
                return channel
        except OSError:
            pass
        except BaseException:
            channel.close()
            raise
        await asyncio.sleep(retry)


def _itself(channel: GuestChannel) -> GuestChannel:
    return channel
