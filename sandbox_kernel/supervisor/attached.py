"""The volumes of one VM: taken when its kernel is launched, not before; plugged in; frozen at the end."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress

from sandbox_kernel.errors import SandboxKernelError, VolumeBusy
from sandbox_kernel.files.volumes import VolumeStore
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.volume import Volume

log = logging.getLogger(__name__)

_PATIENCE = 2.0
"""Seconds for the clean-up of a kernel that has just ended."""
_POLL = 0.02
_CONNECT = 1.0
_FREEZING = 5.0
"""Seconds that a guest has to write out what it has; then its volumes are what they are after a crash."""


class Attached:
    """The volumes of one VM."""

    def __init__(self) -> None:
        self._held: list[tuple[Volume, int]] = []

    async def hold(self, volumes: Sequence[Volume]) -> None:
        """Takes them.

        Raises:
            ConfigurationError: there is no such volume.
            VolumeBusy: somebody has one, and in a way that excludes this one.
            HostError: one cannot be opened.
        """
        store = VolumeStore()
        deadline = time.monotonic() + _PATIENCE
        for volume in volumes:
            while True:
                try:
                    self._held.append((volume, store.hold(volume.name, volume.writable)))
                    break
                except VolumeBusy:
                    if time.monotonic() > deadline:
                        raise
                await asyncio.sleep(_POLL)

    async def plug_in(self, machine: Machine) -> list[dict[str, object]]:
        """Plugs them into a guest that runs.

        Returns:
            What the agent is told of each, which mounts them.

        Raises:
            VolumeError: QEMU does not take one.
        """
        told: list[dict[str, object]] = []
        for volume, fd in self._held:
            serial = await machine.plug_in(volume.name, fd, volume.writable)
            told.append({"serial": serial, "target": str(volume.target), "read_only": not volume.writable})
        return told

    async def freeze(self, machine: Machine) -> None:
        """Has the guest, if it is of a mind to, write out what it has; what it does not is logged.

        Its machine has to be ended after that.
        """
        if machine.ended.done() or not any(volume.writable for volume, _ in self._held):
            return
        try:
            async with asyncio.timeout(_FREEZING):
                agent = await machine.connect_agent(_CONNECT)
                try:
                    await agent.freeze(_FREEZING)
                finally:
                    await agent.aclose()
        except (SandboxKernelError, OSError, TimeoutError) as error:
            log.warning("the volumes were not written out at the end (%s)", error or "no answer in time")

    def close(self) -> None:
        """Lets go of them; whoever else has the same open files has them still. Idempotent."""
        held, self._held = self._held, []
        for _, fd in held:
            with suppress(OSError):
                os.close(fd)
