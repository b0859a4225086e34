"""A micro-VM from power-on to power-off.

    start   cgroup → vsock device → jailed QEMU → QMP greeting → guest's agent answers
    ended   a future: why the machine is no more (QEMU died, a protocol was broken, powered off, panicked)
    stop    the reverse of start, written once, run whatever happened before

The machine owns every resource it makes through one AsyncExitStack, and notes each phase of its start.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from qemu.qmp import QMPError

from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.agent.protocol import AGENT_PORT
from sandbox_kernel.errors import (
    BootError,
    GuestError,
    GuestProtocolError,
    HostError,
    SandboxKernelError,
    TemplateError,
)
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.migration import restore
from sandbox_kernel.machine.state import Lifecycle, State
from sandbox_kernel.machine.vmm import Vmm, VmmPlan
from sandbox_kernel.qemu.command import VsockDevice, vsock_device
from sandbox_kernel.template.store import Template
from sandbox_kernel.trace import Trace
from sandbox_kernel.vsock import kernel as kernel_vsock
from sandbox_kernel.vsock.host import VsockHost
from sandbox_kernel.vsock.reservation import reserve_cid
from sandbox_kernel.vsock.userspace import UserspaceVsock

log = logging.getLogger(__name__)

_CID = 3
"""The guest's CID under the userspace device, which each VM has for itself (0 to 2 are reserved)."""
_POLL = 0.05
_POLL_RESTORED = 0.002
_ATTEMPT = 5.0


@dataclass(frozen=True)
class MachinePlan:
    """What a machine needs beside the image: everything decided, nothing to look up.

    Attributes:
        image: the guest image.
        memory: RAM in MiB.
        vcpus: virtual CPUs.
        accelerator: `kvm` or `tcg`.
        vsock: `kernel` or `userspace`.
        boot_timeout: seconds until the agent must have answered.
        logs: folder for the logs of this VM.
        cgroup: joined by QEMU.
        template: to restore from instead of booting; None to boot.
    """

    image: Image
    memory: int
    vcpus: int
    accelerator: str
    vsock: str
    boot_timeout: float
    logs: Path
    cgroup: Cgroup
    template: Template | None = None


def choose_vsock(requested: str) -> tuple[str, str]:
    """Which vsock implementation to use, and why.

    Raises:
        HostError: `kernel` was demanded and is not available.
    """
    missing = kernel_vsock.unavailable()
    if requested == "userspace":
        return "userspace", "asked for"
    if missing is None:
        return "kernel", "/dev/vhost-vsock is usable"
    if requested == "kernel":
        raise HostError(
            f"vsock 'kernel' was asked for and {missing}; load the module with `modprobe vhost_vsock` "
            "or choose vsock = 'userspace'."
        )
    return "userspace", missing


class Machine:
    """One micro-VM; start it once, stop it always."""

    def __init__(self, plan: MachinePlan, trace: Trace | None = None) -> None:
        """Nothing yet; `trace` is where the phases of the start are noted."""
        self._plan = plan
        self._trace = trace or Trace()
        self._lifecycle = Lifecycle()
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: asyncio.Future[SandboxKernelError] = asyncio.get_running_loop().create_future()
        """Resolved once with the reason when the machine is no more of use."""

    @property
    def restored(self) -> bool:
        """Whether it goes on from a template."""
        return self._plan.template is not None

    @property
    def state(self) -> State:
        """Where this machine stands."""
        return self._lifecycle.state

    async def start(self) -> None:
        """Boots or restores the guest until its agent has answered.

        Raises:
            BootError: the deadline passed; the message has the console's last lines and the logs' folder.
            GuestError: QEMU or the guest ended on the way.
            HostError: something on the host is missing.
            TemplateError: the template cannot be restored; TemplateUnsafeError: not on this host.
        """
        self._lifecycle.move(State.BOOTING)
        try:
            template = self._plan.template
            device = await self._power_on(template)
            if template is not None:
                await self._restore(template, device)
            await self._reach_agent()
        except BaseException:
            await self.stop()
            raise
        self._lifecycle.move(State.READY)

    async def connect_agent(self, timeout: float = _ATTEMPT) -> AgentClient:
        """One more connection to the agent: calls on one connection wait for each other."""
        return AgentClient(await self.vsock.connect(AGENT_PORT, timeout))

    async def stop(self) -> None:
        """Ends the VM and releases everything; idempotent, and safe in every state."""
        if self._lifecycle.state in (State.STOPPING, State.DEAD):
            return
        if self._lifecycle.state is not State.NEW:
            self._lifecycle.move(State.STOPPING)
        await self._stack.aclose()
        self._lifecycle.move(State.DEAD)

    def console_tail(self) -> str:
        """The console's last lines on one line."""
        return self._vmm.console.last_lines()

    async def _power_on(self, template: Template | None) -> VsockDevice:
        """Starts QEMU, which boots, or waits for a template's devices."""
        plan = self._plan
        device, inherited = await self._make_vsock()
        self._saved = self._stack.enter_context(template.state.open("rb")) if template else None
        self._vmm = Vmm(
            VmmPlan(
                plan.image,
                plan.memory,
                plan.vcpus,
                plan.accelerator,
                plan.logs,
                plan.cgroup,
                device,
                template.ram if template else None,
                private=True,
                qemu=template.qemu if template else (),
                inherit=[self._saved.fileno()] if self._saved else [],
            )
        )
        self._stack.push_async_callback(self._vmm.aclose)
        await self._vmm.start()
        inherited.close()
        self.process = self._vmm.process
        self.process.exited.add_done_callback(lambda _: self._on_exit())
        self.vsock.failed.add_done_callback(self._on_violation)
        self._trace.mark("QEMU started")
        await self._vmm.greet(plan.boot_timeout)
        task = asyncio.create_task(self._watch_events(), name="qmp-events")
        self._tasks.add(task)
        self._stack.callback(task.cancel)
        self._trace.mark("QEMU answered")
        return device

    async def _restore(self, template: Template, device: VsockDevice) -> None:
        """Loads the devices' state, lets the guest run, and plugs its vsock in.

        Raises:
            TemplateError: QEMU did not take the state; the template is of no use.
        """
        assert self._saved is not None
        if isinstance(self.vsock, UserspaceVsock):
            self.vsock.reach_memory_of(self.process.qemu_pid)
        qmp = self._vmm.qmp
        try:
            async with asyncio.timeout(self._plan.boot_timeout):
                await restore(qmp, self._saved.fileno())
                self._trace.mark("devices restored")
                await qmp.execute("device_add", {**dict(vsock_device(device)), "id": "vsock"})
                await qmp.execute("cont")
        except (QMPError, OSError, TimeoutError) as error:
            raise TemplateError(
                f"QEMU did not restore the template {template.digest} "
                f"({self.process.last_words() or error}); it is to be made anew."
            ) from error
        self._vmm.type("")
        self._trace.mark("vsock plugged in")

    async def _make_vsock(self) -> tuple[VsockDevice, socket.socket | IO[bytes]]:
        """The host's side of vsock, what QEMU is told of it, and the end that only QEMU keeps."""
        self.vsock: VsockHost
        if self._plan.vsock == "kernel":
            reservation, cid = reserve_cid()
            self.vsock = kernel_vsock.KernelVsock(cid)
            self._stack.push_async_callback(self.vsock.aclose)
            self._stack.callback(reservation.close)
            return VsockDevice(reservation.fileno(), cid), reservation
        userspace = UserspaceVsock(_CID)
        self.vsock = userspace
        self._stack.push_async_callback(userspace.aclose)
        end = userspace.qemu_socket()
        self._stack.callback(end.close)
        return VsockDevice(end.fileno()), end

    async def _watch_events(self) -> None:
        with self._vmm.qmp.listener(("SHUTDOWN", "GUEST_PANICKED")) as events:
            async for event in events:
                data = cast(dict[str, object], event.get("data", {}))
                reason = str(data.get("reason", ""))[:40]
                what = (
                    "panicked"
                    if event["event"] == "GUEST_PANICKED" or reason == "guest-panic"
                    else "powered off"
                )
                self._end(GuestError(f"The VM {what} ({self._evidence()})."))

    async def _reach_agent(self) -> None:
        plan = self._plan
        try:
            async with asyncio.timeout(plan.boot_timeout):
                while True:
                    if self.ended.done():
                        raise self.ended.result()
                    with suppress(ConnectionError, TimeoutError):
                        self.agent = await self.connect_agent()
                        break
                    await asyncio.sleep(_POLL if plan.template is None else _POLL_RESTORED)
                self._stack.push_async_callback(self.agent.aclose)
                if plan.template is None:
                    await self.agent.hello()
        except TimeoutError as error:
            raise BootError(
                f"The VM's agent did not answer within boot_timeout = {plan.boot_timeout:g} s "
                f"({self._evidence()}); raise boot_timeout if this machine is only slow."
            ) from error
        self._trace.mark("agent answered")

    def _on_exit(self) -> None:
        status = self.process.exited.result()
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        if status > 128:
            how = f"was killed by signal {status - 128}"  # bubblewrap reports its child's signal so
        if self._plan.cgroup.out_of_memory():
            how += " when its host cgroup ran out of memory"
        words = self.process.last_words()
        self._end(GuestError(f"QEMU {how}{': ' + words if words else ''} ({self._evidence()})."))

    def _on_violation(self, failed: asyncio.Future[GuestProtocolError]) -> None:
        if not failed.cancelled():
            self._end(failed.result())

    def _end(self, reason: SandboxKernelError) -> None:
        if not self.ended.done() and self.state in (State.BOOTING, State.READY):
            log.warning("%s", reason)
            self.ended.set_result(reason)

    def _evidence(self) -> str:
        console = self.console_tail()
        return f"console: {console}; logs: {self._plan.logs}" if console else f"logs: {self._plan.logs}"
