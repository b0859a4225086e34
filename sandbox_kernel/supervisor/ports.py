"""The exposed ports of one VM: listened on, reached through its agent, taken away again."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from sandbox_kernel.errors import ConfigurationError, GuestProtocolError
from sandbox_kernel.exposure import Exposure, check
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.ports.door import Door, Places
from sandbox_kernel.ports.listener import Listener
from sandbox_kernel.supervisor.belongings import Belongings

log = logging.getLogger(__name__)

_CONNECT = 10.0


class Ports:
    """The exposed ports of one VM."""

    def __init__(
        self, belongings: Belongings, most: int | None, violated: Callable[[GuestProtocolError], None]
    ) -> None:
        """Nothing is exposed yet.

        Args:
            belongings: the VM's, which sees to it that no socket outlives this process.
            most: how many the administrator allows (exposure.py, `check`).
            violated: told when the guest broke its protocol.
        """
        self._belongings, self._most, self._violated = belongings, most, violated
        self._places = Places()
        self._doors: list[Door] = []
        self._machine: Machine | None = None

    @property
    def exposures(self) -> tuple[Exposure, ...]:
        """What is exposed, and where."""
        return tuple(door.exposure for door in self._doors)

    def listen(self, exposures: Iterable[Exposure]) -> None:
        """Listens for ports, of a guest that may not run yet: who connects waits for `open`.

        Raises:
            ConfigurationError: there are too many, or an address is not to be had; nothing has changed then.
        """
        wanted = tuple(exposures)
        check((*self.exposures, *wanted), self._most)
        with ExitStack() as stack:
            listeners = []
            for exposure in wanted:
                listeners.append(Listener(exposure))
                stack.callback(listeners[-1].close)
            stack.pop_all()
        for listener in listeners:
            if listener.socket:
                self._belongings.guard(listener.socket)
        doors = [Door(listener, self._reach, self._places, self._violated) for listener in listeners]
        self._doors += doors
        if self._machine is not None:
            self._let_in(doors)

    def open(self, machine: Machine) -> None:
        """Lets clients in, now that `machine` runs."""
        self._machine = machine
        self._let_in(self._doors)

    def add(self, exposure: Exposure) -> Exposure:
        """Exposes a port of a guest that runs; where.

        Raises:
            ConfigurationError: as `listen`.
        """
        self.listen((exposure,))
        return self.exposures[-1]

    async def remove(self, exposure: Exposure) -> None:
        """Takes a port away, at the address that is named or else at all of them; its connections end.

        Raises:
            ConfigurationError: it is not exposed.
        """
        gone = [
            door
            for door in self._doors
            if door.exposure == exposure or (exposure == Exposure(door.exposure.guest))
        ]
        if not gone:
            there = ", ".join(map(str, self.exposures)) or "none"
            raise ConfigurationError(f"{exposure} is not exposed; there are: {there}.")
        self._doors = [door for door in self._doors if door not in gone]
        for door in gone:
            await self._close(door)
            log.info("no longer exposed: %s", door.exposure)

    async def aclose(self) -> None:
        """Exposes nothing any more; idempotent."""
        doors, self._doors = self._doors, []
        for door in doors:
            await self._close(door)

    async def _close(self, door: Door) -> None:
        if door.listener.socket:
            self._belongings.release(door.listener.socket)
        await door.aclose()

    def _let_in(self, doors: Iterable[Door]) -> None:
        for door in doors:
            door.open()
            log.info("port %d is exposed at %s", door.exposure.guest, door.exposure.address)

    async def _reach(self, port: int) -> socket.socket:
        """A connection to a port of the guest, over one to the agent of its own."""
        assert self._machine is not None
        agent = await self._machine.connect_agent(_CONNECT)
        try:
            return await agent.connect(port)
        finally:
            await agent.aclose()
