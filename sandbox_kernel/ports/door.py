"""One exposed port at work: who connects on the host is joined to a connection in the guest.

    client ═ TCP or Unix socket ═ this process ═ vsock ═ agent (guest/ports.py) ═ TCP ═ port of the guest

Nothing that comes is looked at: the client talks to whatever the guest has at that port. Bounded are the
number of connections, of those that wait for the guest's answer, how long they do, and what each one holds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable

from sandbox_kernel.errors import GuestProtocolError, SandboxKernelError
from sandbox_kernel.exposure import Exposure
from sandbox_kernel.ports.listener import Listener
from sandbox_kernel.ports.pump import HALF_OPEN, Pump

log = logging.getLogger(__name__)

CONNECTIONS = 64
"""Connections of one VM at a time; further ones wait."""
ASKING = 4
"""Connections of one VM that wait for the agent's answer: it has places for a few requests only."""
_ASKING_HERE = 2
"""Those to one port, so that a port that does not accept leaves some to others."""
_PAUSE = 0.2

Reach = Callable[[int], Awaitable[socket.socket]]
"""Connects to a port of the guest.

Raises OSError, TimeoutError or SandboxKernelError when it cannot; of these GuestProtocolError costs the VM.
"""


class Places:
    """What all exposed ports of one VM share."""

    def __init__(self, connections: int = CONNECTIONS, asking: int = ASKING) -> None:
        self.connections = asyncio.Semaphore(connections)
        self.asking = asyncio.Semaphore(asking)


class Door:
    """One exposed port."""

    def __init__(
        self,
        listener: Listener,
        reach: Reach,
        places: Places,
        violated: Callable[[GuestProtocolError], None],
        half_open: float = HALF_OPEN,
    ) -> None:
        """Nobody is let in before `open`.

        Args:
            listener: where clients come from; owned from now on.
            reach: how the guest is reached.
            places: bounds.
            violated: told when the guest broke its protocol.
            half_open: seconds (pump.py).
        """
        self.listener, self._reach, self._places = listener, reach, places
        self._violated, self._half_open = violated, half_open
        self._asking_here = asyncio.Semaphore(_ASKING_HERE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._told = False

    @property
    def exposure(self) -> Exposure:
        """What is exposed, and where."""
        return self.listener.exposure

    def open(self) -> None:
        """Lets clients in, also those that wait already."""
        for listening in self.listener.sockets:
            self._task(self._admit(listening))

    async def aclose(self) -> None:
        """Ends all connections and listens no more; idempotent."""
        self.listener.close()
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _task(self, coroutine: Awaitable[None]) -> None:
        task = asyncio.ensure_future(coroutine)
        assert isinstance(task, asyncio.Task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _admit(self, listening: socket.socket) -> None:
        """Accepts one client after the other, and the next one when there is a place for this one."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listening)
            except OSError as error:
                if listening.fileno() < 0:
                    return
                log.warning("a connection to %s waits: %s", self.exposure.address, error)
                await asyncio.sleep(_PAUSE)  # no descriptors left: it stays in the backlog
                continue
            try:
                await self._places.connections.acquire()
            except BaseException:
                client.close()
                raise
            self._task(self._serve(client))

    async def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                if client.family != socket.AF_UNIX:
                    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not await self._join(client):
                    _break_off(client)
        except OSError as error:
            log.info("a connection to %s ends: %s", self.exposure.address, error)
        finally:
            self._places.connections.release()

    async def _join(self, client: socket.socket) -> bool:
        """Carries until the end; False when the client is to see that it was none."""
        try:
            async with self._asking_here, self._places.asking:
                guest = await self._reach(self.exposure.guest)
        except GuestProtocolError as error:
            self._violated(error)
            return False
        except (OSError, TimeoutError, SandboxKernelError) as error:
            if not self._told:
                self._told = True
                log.info("port %d of the VM is not reached (told once): %s", self.exposure.guest, error)
            return False
        with guest:
            return await Pump(client, guest, self._half_open).run()


def _break_off(client: socket.socket) -> None:
    """Has closing it tell the client of an error, which the end of a stream would not be (RST, tcp(7))."""
    if client.family != socket.AF_UNIX:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
