"""QEMU from the start of its process to the end of it: jail, console, QMP. What it runs is the caller's.

start    socketpairs → jailed process → QMP greeting
close    the reverse; the process is killed, whatever it does
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import AsyncExitStack, suppress

from qemu.qmp import QMPClient, QMPError

from sandbox_kernel.errors import HostError
from sandbox_kernel.machine.power import Powered, VmmPlan, power_on
from sandbox_kernel.machine.process import QemuProcess
from sandbox_kernel.machine.transcript import Transcript

_QUIT = 0.5


class Vmm:
    """A running QEMU."""

    def __init__(self, plan: VmmPlan, powered: Powered | None = None) -> None:
        """Nothing yet; see `start`. `powered` is the process, where it has been started before."""
        self._plan = plan
        self._powered = powered
        self._stack = AsyncExitStack()
        self.qmp = QMPClient("sandbox-kernel")
        self.qmp.logger.setLevel(logging.CRITICAL)  # it logs a peer's death as an error; we report it better

    def start(self) -> None:
        """Starts QEMU's process, unless it runs already; `greet` comes next.

        Raises:
            HostError: QEMU, bubblewrap or something that they need is missing.
            TemplateUnsafeError: this host cannot protect the RAM's file from this QEMU.
        """
        powered = self._powered or power_on(self._plan)
        self._qmp_socket, self._console = powered.qmp, powered.console
        self._stack.callback(powered.spawned.popen.kill)  # should the next lines fail
        for end in (powered.qmp, powered.console):
            self._stack.callback(end.close)
        self.console = Transcript(self._console.dup().detach(), self._plan.logs / "console.log")
        self._stack.callback(self.console.close)
        self.process = QemuProcess(powered.spawned, self._plan.logs / "qemu.log")
        self._stack.push_async_callback(self.process.kill)

    async def greet(self, timeout: float) -> None:
        """Waits for QMP, at most `timeout` seconds.

        Raises:
            HostError: QEMU does not answer, most often because it has ended; with its last words.
            TemplateUnsafeError: it got no RAM, as its jail has the file read-only.
        """
        self._stack.push_async_callback(self._disconnect)
        try:
            async with asyncio.timeout(timeout):
                await self.qmp.connect(self._qmp_socket)
        except (QMPError, OSError, TimeoutError) as error:
            await self.process.kill()
            self.process.check_ram()
            raise HostError(
                f"QEMU did not start ({self.process.last_words() or error}); logs are in {self._plan.logs}."
            ) from error

    def type(self, text: str) -> None:
        """Sends a line to the guest's console."""
        self._console.send(text.encode() + b"\n")

    async def aclose(self) -> None:
        """Ends QEMU and releases everything; idempotent, and safe whatever `start` has come to."""
        await self._stack.aclose()

    async def _disconnect(self) -> None:
        with suppress(Exception):  # the connection is going away either way, in whatever state it is
            async with asyncio.timeout(_QUIT):
                await self.qmp.disconnect()
