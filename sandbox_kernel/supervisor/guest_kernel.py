"""The kernel in a guest: it is started, or becomes this client's; the relay is connected to it; it ends.

A template's kernel runs already. The relay can be connected to it before it is told whose it is, and stays
connected if it becomes what is asked for. Where it cannot, another one takes its place, and the relay's
connections are made anew.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from sandbox_kernel.agent.client import Configuration, KernelExit
from sandbox_kernel.agent.protocol import CHANNEL_PORTS, can_adopt
from sandbox_kernel.errors import GuestError, KernelStartError
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.network.addresses import LINKS
from sandbox_kernel.relay.relay import Relay
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.control import LaunchRequest
from sandbox_kernel.trace import Trace

log = logging.getLogger(__name__)

_CONNECT = 10.0
_ENTROPY = 64
_RIGHT_ENOUGH = 15_000_000
"""Nanoseconds that a guest's clock may be behind."""
_LATER = 0.2
"""Seconds until somebody waits for the end of a kernel that is known to live: its first request is first."""


class GuestKernel:
    """The kernel of one machine."""

    def __init__(self, machine: Machine, relay: Relay, trace: Trace) -> None:
        """One that has not been started.

        Args:
            machine: whose agent answers.
            relay: to be connected to it.
            trace: where the phases of the start are noted.
        """
        self._machine, self._relay, self._trace = machine, relay, trace
        self._stack = AsyncExitStack()
        self._attaching: asyncio.Task[None] | None = None
        self._late = False
        self.adopted = False
        """Whether it is the template's, which cannot but accept connections."""
        self.exit: asyncio.Future[KernelExit] = asyncio.get_running_loop().create_future()
        """How it ended; pending before `start`."""

    async def rehearse(self, spec: VMSpec) -> None:
        """Has the template's kernel go through a start with an identity that nobody uses."""
        await self._attach()
        await self._machine.agent.rehearse(_configuration(spec.processes))

    async def start(
        self,
        request: LaunchRequest,
        mounts: Sequence[str] = (),
        volumes: Sequence[Mapping[str, object]] = (),
    ) -> None:
        """Starts it, or has the one that stands by become it.

        Args:
            request: whose it is.
            mounts: targets of mounts that have been asked for, which it waits for.
            volumes: those that have been plugged in, as the agent's protocol has them.

        Raises:
            KernelStartError: its command cannot be executed.
            MountError: one of the mounts cannot be made; VolumeError: a volume cannot be mounted.
        """
        if self._machine.restored and can_adopt(list(request.argv), dict(request.env)):
            self._attach()
        spec = request.spec
        # A template's network device, which has the addresses that all have, is set up in it.
        network = spec.network != "none" and not self._machine.restored
        configuration = _configuration(spec.processes, bool(spec.disk), network)
        connection = _guest_connection(request.connection)
        sent = time.time_ns()
        started = await self._machine.agent.start(
            request.argv,
            request.env,
            connection,
            cwd=request.spec.workdir or None,
            configuration=configuration,
            mounts=mounts,
            volumes=volumes,
        )
        took = time.time_ns() - sent
        self._trace.mark("kernel started")
        self.adopted = started.adopted
        if not self.adopted:
            await self._detach()
        self.exit = self._task(self._await_end(_LATER if self.adopted else 0.0))
        # The guest has set its clock on the way; whatever did not pass on it was spent before or after.
        self._late = took - (started.clock - configuration.clock) > _RIGHT_ENOUGH

    async def connect(self) -> None:
        """Sets the guest's clock if it may be late, connects the relay, has it forward, waits for the kernel.

        A kernel that ends after it has accepted connections is no error here.

        Raises:
            KernelStartError: the kernel ended before; without the place of the logs.
            GuestError: the machine did.
        """
        if self._late:
            log.info("the guest's clock is right but for %.3f s", await self._machine.agent.synchronise())
            self._trace.mark("clock set")
        attaching = self._attach()
        either: set[asyncio.Future[Any]] = {attaching, self.exit, self._machine.ended, self._relay.failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if attaching.done():
            attaching.result()
        elif self._machine.ended.done():
            raise self._machine.ended.result()
        elif self._relay.failed.done():
            raise self._relay.failed.result()
        else:
            ended = self.exit.result()
            words = f": {ended.tail[-500:]}" if ended.tail else ""
            raise KernelStartError(f"The kernel {ended.how()} before it accepted connections{words}")
        self._relay.start()
        self._trace.mark("kernel connected")
        if not self.adopted:
            initialised = self._task(self._relay.initialised())
            either = {initialised, self.exit, self._machine.ended, self._relay.failed}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            self._trace.mark("kernel initialised")
        log.info("started: %s", self._trace.line())

    async def aclose(self) -> None:
        """Waits for nothing any more; the kernel's process is the machine's. Idempotent."""
        await self._stack.aclose()

    def _attach(self) -> asyncio.Task[None]:
        """Connects the relay to the guest's channels; once, until `_detach`."""
        if self._attaching is None:
            vsock = self._machine.vsock
            self._attaching = self._task(
                self._relay.attach(lambda channel: vsock.connect(CHANNEL_PORTS[channel], _CONNECT))
            )
        return self._attaching

    async def _detach(self) -> None:
        """Lets go of a kernel that has been replaced by another one."""
        if self._attaching is not None:
            self._attaching.cancel()
            await asyncio.gather(self._attaching, return_exceptions=True)
            self._relay.detach()
            self._attaching = None

    async def _await_end(self, delay: float) -> KernelExit:
        """Waits until it has ended, over a connection of its own."""
        await asyncio.sleep(delay)
        try:
            waiter = await self._machine.connect_agent()
        except OSError as error:
            raise GuestError(f"The guest's agent cannot be asked for the kernel's end ({error}).") from error
        self._stack.push_async_callback(waiter.aclose)
        return await waiter.wait()

    def _task(self, coroutine: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.get_running_loop().create_task(coroutine)

        async def finish() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(finish)
        return task


def _configuration(processes: int, scratch: bool = False, network: bool = False) -> Configuration:
    entropy = os.urandom(_ENTROPY)
    links = LINKS if network else None
    return Configuration(time.time_ns(), "sandbox", entropy, processes, scratch=scratch, network=links)


def _guest_connection(info: Mapping[str, Any]) -> dict[str, Any]:
    """The connection info for the guest: key and scheme are Jupyter's, the endpoints are the guest's own."""
    return {name: info[name] for name in ("key", "signature_scheme", "kernel_name") if name in info}
