"""Bytes between two stream sockets, both ways, each with an end of its own.

Rules. Each way holds one piece, and reads the next one when that has been taken, so a slow reader slows its
writer down and costs nothing. The end of one way is passed on and leaves the other alone; who takes no more
ends the way to it; who breaks ends both. A connection of which one way has ended and nothing comes the other
way for `HALF_OPEN` seconds is over, too: its client is gone, and what serves it has not noticed.
"""

from __future__ import annotations

import asyncio
import socket

_PIECE = 64 * 1024
HALF_OPEN = 600.0


class Pump:
    """Two sockets, joined."""

    def __init__(self, one: socket.socket, other: socket.socket, half_open: float = HALF_OPEN) -> None:
        """Two connected, non-blocking sockets, which stay the caller's; `half_open` is in seconds."""
        self._one, self._other = one, other
        self._half_open = half_open
        self._pieces = 0

    async def run(self) -> bool:
        """Carries until both ways have ended; False when one was broken off."""
        loop = asyncio.get_running_loop()
        ways = {
            loop.create_task(self._carry(self._one, self._other)),
            loop.create_task(self._carry(self._other, self._one)),
        }
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            while not all(way.done() for way in ways):
                if any(way.done() and way.exception() for way in ways):
                    return False
                before = self._pieces
                await asyncio.wait({way for way in ways if not way.done()}, timeout=self._half_open)
                if self._pieces == before and not all(way.done() for way in ways):
                    return False
            return not any(way.exception() for way in ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(source, _PIECE):
            self._pieces += 1
            try:
                await loop.sock_sendall(sink, data)
            except OSError:
                _shut(source, socket.SHUT_RD)
                return
            await asyncio.sleep(0)  # two sides that are always ready would leave nobody else a turn
        _shut(sink, socket.SHUT_WR)


def _shut(side: socket.socket, how: int) -> None:
    try:
        side.shutdown(how)
    except OSError:
        pass  # it is not connected any more
