"""The supervisor: everything that happens to one VM, in order, in one asyncio process.

    launch   folders and guardian → relay binds → machine boots → agent starts the kernel → relay attaches
    run      forwards signals; waits for the first of: client gone, stop asked for, kernel ended, VM ended
    end      truthful death report if the end was not orderly → machine stops → relay closes → process exits

Files and cgroup are then removed by the guardian (jail/guardian.py), which needs no cooperation from here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.agent.client import KernelExit
from sandbox_kernel.agent.protocol import CHANNEL_PORTS, can_adopt
from sandbox_kernel.errors import (
    BootError,
    GuestError,
    HostError,
    KernelStartError,
    NoSpaceError,
    SandboxKernelError,
    TemplateError,
    TemplateUnsafeError,
)
from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.jail import cgroup
from sandbox_kernel.jail.guardian import Guardian
from sandbox_kernel.machine import accelerator
from sandbox_kernel.machine.machine import Machine, MachinePlan, choose_vsock
from sandbox_kernel.machine.template import key_of, make
from sandbox_kernel.relay.relay import ClientEndpoints, Relay
from sandbox_kernel.supervisor import folders
from sandbox_kernel.supervisor.control import LaunchRequest, addresses
from sandbox_kernel.supervisor.log import log_to
from sandbox_kernel.template.key import TemplateKey
from sandbox_kernel.template.store import TemplateStore

log = logging.getLogger(__name__)

_DRAIN = 2.0
_SIGNAL = 10.0
_CONNECT = 10.0
_TEMPLATE_AFTER = 5.0
"""Seconds after a cold start before a template is made: the first cells come first."""
_TEMPLATE_TIMEOUT = 300.0


@dataclass(frozen=True)
class Ending:
    """How a VM came to its end.

    Attributes:
        status: exit status for the supervisor's process, what Jupyter sees as the kernel's.
        reason: a sentence for the user; empty when the end was asked for.
        by_user_code: the code in the kernel ended it.
    """

    status: int
    reason: str = ""
    by_user_code: bool = False


class Supervisor:
    """One VM and its kernel."""

    def __init__(self, control_fd: int) -> None:
        """`control_fd` is the supervisor's end of the client's socket; the guardian holds it, too."""
        self._control_fd = control_fd
        self._stack = AsyncExitStack()
        self._guardian: Guardian | None = None
        self._machine: Machine | None = None
        self._relay: Relay | None = None
        self._started = asyncio.Event()
        self._orderly = False
        self.logs = ""
        """Folder of the VM's logs, once there is one."""
        self.ended: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        """Resolved when the VM is to end; the caller then calls `close`."""
        self._watches: set[asyncio.Task[None]] = set()
        self._trace: dict[str, float] = {}

    async def launch(self, request: LaunchRequest) -> dict[str, Any]:
        """Boots the VM and starts the kernel in it.

        Returns:
            What the client may want to know: choices made, seconds of each phase, process ids.

        Raises:
            SandboxKernelError: with a sentence for the user; the VM's logs are then kept.
        """
        self._began = time.monotonic()
        try:
            async with asyncio.timeout(request.spec.boot_timeout):
                return await self._launch(request)
        except TimeoutError as error:
            self.keep_logs()
            raise BootError(
                "The kernel did not accept connections within "
                f"boot_timeout = {request.spec.boot_timeout:g} s ({self._evidence()}); "
                "raise boot_timeout if this machine is only slow."
            ) from error
        except OSError as error:
            raise _of_the_host(error) from error
        except (HostError, GuestError):
            self.keep_logs()
            raise

    async def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group in the guest; False when there is none any more."""
        assert self._machine is not None
        if self.ended.done():
            return False
        async with asyncio.timeout(_SIGNAL):
            return await self._machine.agent.signal(number)

    async def status(self) -> dict[str, Any]:
        """What the agent reports of the kernel and the guest's memory."""
        assert self._machine is not None
        status = await self._machine.agent.status()
        return {"guest": status.to_dict(), "trace": self._trace}

    def end(self, ending: Ending, orderly: bool = False) -> None:
        """Asks for the end; the first ending counts."""
        if not self.ended.done():
            self._orderly = orderly
            self.ended.set_result(ending)

    def keep_logs(self) -> None:
        """The logs are named in an error and shall outlive the VM."""
        if self._guardian is not None:
            self._guardian.keep_logs()

    async def close(self) -> None:
        """Tells the truth to whoever waits for an answer, then releases everything; idempotent."""
        ending = self.ended.result() if self.ended.done() else Ending(1)
        if self._relay is not None and ending.reason and not self._orderly:
            await self._relay.report_death(ending.reason, reply_to_cells=not ending.by_user_code)
        await self._stack.aclose()

    async def _launch(self, request: LaunchRequest) -> dict[str, Any]:
        spec, info = request.spec, request.connection
        self._memory = spec.memory
        image = ImageStore().open(spec.image)
        chosen, why_accelerator = await accelerator.choose(spec.accelerator, image)
        vsock, why_vsock = choose_vsock(spec.vsock)
        self._mark("decided")
        claimed = folders.claim(request.id)
        self.logs = str(claimed.logs)
        group = cgroup.create(request.id, spec.memory, spec.vcpus)
        self._guard(claimed, group)
        log_to(claimed.logs / "supervisor.log")
        log.info("accelerator %s: %s", chosen, why_accelerator)
        log.info("vsock %s: %s", vsock, why_vsock)
        if group.missing:
            log.warning("QEMU's own memory is not bounded: %s", group.missing)
        self._relay = relay = Relay(_endpoints(info), info["key"].encode(), info["signature_scheme"])
        self._stack.push_async_callback(relay.aclose)
        relay.bind()
        key = key_of(image, spec.memory, spec.vcpus, chosen, spec.preload)
        template = TemplateStore().open(key) if spec.start == "auto" else None
        plan = MachinePlan(
            image, spec.memory, spec.vcpus, chosen, vsock, spec.boot_timeout, claimed.logs, group, template
        )
        machine = await self._start_machine(plan)
        self._mark("restored" if machine.restored else "booted")
        attach = self._task(self._attach(relay, machine, request))
        kernel_exit = await self._start_kernel(machine, request)
        self._mark("kernel started")
        await self._until_attached(attach, kernel_exit)
        self._mark("kernel connected")
        if spec.start == "auto" and not machine.restored and TemplateStore().open(key) is None:
            self._task(self._make_template(key, image))
        self._watch(machine.ended, self._on_machine_ended)
        self._watch(relay.failed, self._on_machine_ended)
        self._watch(kernel_exit, self._on_kernel_exit)
        return {
            "accelerator": [chosen, why_accelerator],
            "vsock": [vsock, why_vsock],
            "image": image.digest,
            "guest_kernel": image.manifest.kernel,
            "logs": str(claimed.logs),
            "start": "restored" if machine.restored else "cold",
            "trace": self._trace | {f"machine: {name}": seconds for name, seconds in machine.phases},
        }

    async def _start_machine(self, plan: MachinePlan) -> Machine:
        """Restores a VM; boots it when there is no template, or none that is of any use."""
        self._machine = machine = Machine(plan)
        self._stack.push_async_callback(machine.stop)
        try:
            await machine.start()
        except TemplateError as error:
            assert plan.template is not None
            log.warning("%s The kernel boots instead.", error)
            if not isinstance(error, TemplateUnsafeError):
                with suppress(HostError):
                    TemplateStore().remove(plan.template.digest)
            return await self._start_machine(dataclasses.replace(plan, template=None))
        return machine

    async def _make_template(self, key: TemplateKey, image: Image) -> None:
        """Makes the template that this kernel lacked, for the next one: later, and after everything else."""
        await asyncio.sleep(_TEMPLATE_AFTER)
        try:
            made = await make(TemplateStore(), key, image, timeout=_TEMPLATE_TIMEOUT)
            log.info("template %s", "is being made by somebody else" if made is None else made.digest)
        except SandboxKernelError as error:
            log.warning("%s", error)

    def _guard(self, claimed: folders.Folders, group: cgroup.Cgroup) -> None:
        """Starts the guardian, and another one whenever it is killed."""
        loop = asyncio.get_running_loop()
        self._guardian = guardian = Guardian(
            claimed.runtime, claimed.logs, group.folders, hold=(claimed.lock, self._control_fd)
        )
        pidfd = os.pidfd_open(guardian.pid)

        def again() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            guardian.reap()
            log.warning("the guardian was killed; another one takes over")
            self._guard(claimed, group)

        loop.add_reader(pidfd, again)

    async def _start_kernel(self, machine: Machine, request: LaunchRequest) -> asyncio.Task[KernelExit]:
        await machine.agent.configure(
            clock=time.time_ns(), hostname="sandbox", entropy=os.urandom(64), pids=request.spec.processes
        )
        connection = _guest_connection(request.connection)
        starting = self._task(machine.agent.start(request.argv, request.env, connection))
        waiter = await machine.connect_agent()
        self._stack.push_async_callback(waiter.aclose)
        await starting
        self._started.set()
        log.info("the guest's clock is right but for %.3f s", await machine.agent.synchronise())
        return self._task(waiter.wait())

    async def _attach(self, relay: Relay, machine: Machine, request: LaunchRequest) -> None:
        """Connects the relay to the guest's channels, as soon as they are those of the kernel to come."""
        if not (machine.restored and can_adopt(list(request.argv), dict(request.env))):
            await self._started.wait()
        await relay.attach(lambda channel: machine.vsock.connect(CHANNEL_PORTS[channel], _CONNECT))

    async def _until_attached(
        self, attach: asyncio.Task[None], kernel_exit: asyncio.Task[KernelExit]
    ) -> None:
        """Waits for the relay, unless kernel or machine ends first."""
        machine, relay = self._machine, self._relay
        assert machine is not None
        assert relay is not None
        either: set[asyncio.Future[Any]] = {attach, kernel_exit, machine.ended, relay.failed}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if attach.done():
            attach.result()
            return
        if machine.ended.done():
            raise machine.ended.result()
        if relay.failed.done():
            raise relay.failed.result()
        ended = kernel_exit.result()
        words = f": {ended.tail[-500:]}" if ended.tail else ""
        raise KernelStartError(
            f"The kernel {ended.how()} before it accepted connections{words} ({self._evidence()})."
        )

    async def _on_kernel_exit(self, result: KernelExit) -> None:
        assert self._relay is not None
        log.info("the kernel ended: %s", result)
        await self._relay.drain(_DRAIN)
        reason = "" if self._relay.shutdown_requested else self._death(result)
        self.end(Ending(result.status, reason, by_user_code=result.deliberate))

    def _death(self, ended: KernelExit) -> str:
        """Why the kernel is dead, for the user whose cell was running."""
        if ended.out_of_memory:
            return (
                f"The kernel was killed because the memory limit of {self._memory} MiB was reached; "
                "use less, or raise `memory`."
            )
        return f"The kernel's process {ended.how()}; restart it to go on."

    def _on_machine_ended(self, error: SandboxKernelError) -> None:
        self.keep_logs()
        self.end(Ending(1, str(error)))

    def _watch(self, awaitable: asyncio.Future[Any], then: Callable[[Any], Awaitable[None] | None]) -> None:
        """Runs `then` with the result of `awaitable`; an error in either ends the VM."""

        async def watch() -> None:
            try:
                following = then(await asyncio.shield(awaitable))
                if following is not None:
                    await following
            except SandboxKernelError as error:
                self._on_machine_ended(error)
            except Exception as error:
                log.exception("the supervisor failed")
                self._on_machine_ended(HostError(f"The supervisor failed ({error!r}); logs: {self.logs}."))

        self._task(watch())

    def _task(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._watches.add(task)

        async def finish() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        self._stack.push_async_callback(finish)
        return task

    def _mark(self, phase: str) -> None:
        self._trace[phase] = round(time.monotonic() - self._began, 4)

    def _evidence(self) -> str:
        console = self._machine.console_tail() if self._machine is not None else ""
        return f"console: {console}; logs: {self.logs}" if console else f"logs: {self.logs}"


def _endpoints(info: Mapping[str, Any]) -> ClientEndpoints:
    public, secret = info.get("curve_publickey"), info.get("curve_secretkey")
    return ClientEndpoints(
        addresses(info),
        curve_publickey=public.encode() if public else None,
        curve_secretkey=secret.encode() if secret else None,
    )


def _guest_connection(info: Mapping[str, Any]) -> dict[str, Any]:
    """The connection info for the guest: key and scheme are Jupyter's, the endpoints are the guest's own."""
    return {name: info[name] for name in ("key", "signature_scheme", "kernel_name") if name in info}


def _of_the_host(error: OSError) -> HostError:
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return NoSpaceError(
            f"There is no space left for {error.filename or 'the VM'}; free some and try again."
        )
    return HostError(f"The VM could not be set up ({error}); run `sandbox-kernel doctor`.")
