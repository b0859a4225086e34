"""A micro-VM from power-on to power-off.

    start   cgroup → vsock device → jailed QEMU → QMP greeting → guest's agent answers
    ended   a future: why the machine is no more (QEMU died, a protocol was broken, powered off, panicked)
    stop    the reverse of start, written once, run whatever happened before

The machine owns every resource it makes through one AsyncExitStack, and says about each phase of its start
how long it took (`phases`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, cast

from qemu.qmp import QMPClient, QMPError

from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.agent.protocol import AGENT_PORT
from sandbox_kernel.errors import BootError, GuestError, GuestProtocolError, HostError, SandboxKernelError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.process import QemuProcess
from sandbox_kernel.machine.state import Lifecycle, State
from sandbox_kernel.machine.transcript import Transcript
from sandbox_kernel.qemu.command import QemuConfig, VsockDevice, command_line
from sandbox_kernel.vsock import kernel as kernel_vsock
from sandbox_kernel.vsock.host import VsockHost
from sandbox_kernel.vsock.reservation import reserve_cid
from sandbox_kernel.vsock.userspace import UserspaceVsock

log = logging.getLogger(__name__)

INSTALL = "install it with `sandbox-kernel setup`"
_CID = 3
"""The guest's CID under the userspace device, which each VM has for itself (0 to 2 are reserved)."""
_POLL = 0.05
_ATTEMPT = 5.0
_QUIT = 0.5


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
    """

    image: Image
    memory: int
    vcpus: int
    accelerator: str
    vsock: str
    boot_timeout: float
    logs: Path
    cgroup: Cgroup


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

    def __init__(self, plan: MachinePlan) -> None:
        self._plan = plan
        self._lifecycle = Lifecycle()
        self._stack = AsyncExitStack()
        self._began = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()
        self.phases: list[tuple[str, float]] = []
        """(phase, seconds since `start` when it was done)."""
        self.ended: asyncio.Future[SandboxKernelError] = asyncio.get_running_loop().create_future()
        """Resolved once with the reason when the machine is no more of use."""

    @property
    def state(self) -> State:
        """Where this machine stands."""
        return self._lifecycle.state

    async def start(self) -> None:
        """Boots the guest until its agent has answered.

        Raises:
            BootError: the deadline passed; the message has the console's last lines and the logs' folder.
            GuestError: QEMU or the guest ended on the way.
            HostError: something on the host is missing.
        """
        self._lifecycle.move(State.BOOTING)
        self._began = time.monotonic()
        try:
            await self._power_on()
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
        return self.console.last_lines()

    def mark(self, phase: str) -> None:
        """Notes that `phase` is done now."""
        self.phases.append((phase, time.monotonic() - self._began))

    async def _power_on(self) -> None:
        plan = self._plan
        qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
        bwrap = bubblewrap.find("bwrap", INSTALL)
        qmp_socket, qemu_qmp = _pair(self._stack)
        console, qemu_console = _pair(self._stack)
        device, inherited = await self._make_vsock()
        config = QemuConfig(
            binary=PurePosixPath(qemu),
            image=bubblewrap.IMAGE,
            memory=plan.memory,
            vcpus=plan.vcpus,
            accelerator=plan.accelerator,
            console_fd=qemu_console.fileno(),
            qmp_fd=qemu_qmp.fileno(),
            vsock=device,
        )
        self.console = Transcript(console.detach(), plan.logs / "console.log")
        self._stack.callback(self.console.close)
        jail = bubblewrap.Jail(bwrap, qemu, plan.image.directory, devices(plan.accelerator))
        fds = (qemu_console.fileno(), qemu_qmp.fileno(), device.fd)
        process = await QemuProcess.start(
            jail, command_line(config), fds, plan.cgroup, plan.logs / "qemu.log"
        )
        self._stack.push_async_callback(process.kill)
        for end in (qemu_qmp, qemu_console, inherited):
            end.close()
        self.process = process
        process.exited.add_done_callback(lambda _: self._on_exit())
        self.vsock.failed.add_done_callback(self._on_violation)
        self.mark("QEMU started")
        await self._greet(qmp_socket)

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

    async def _greet(self, qmp_socket: socket.socket) -> None:
        self._qmp = QMPClient("sandbox-kernel")
        self._qmp.logger.setLevel(logging.CRITICAL)  # it logs a peer's death as an error; we report it better
        self._stack.push_async_callback(self._disconnect)
        try:
            async with asyncio.timeout(self._plan.boot_timeout):
                await self._qmp.connect(qmp_socket)
        except (QMPError, OSError, TimeoutError) as error:
            await self.process.kill()
            raise HostError(
                f"QEMU did not start ({self.process.last_words() or error}); logs are in {self._plan.logs}."
            ) from error
        task = asyncio.create_task(self._watch_events(), name="qmp-events")
        self._tasks.add(task)
        self._stack.callback(task.cancel)
        self.mark("QEMU answered")

    async def _disconnect(self) -> None:
        with suppress(Exception):  # the connection is going away either way, in whatever state it is
            async with asyncio.timeout(_QUIT):
                await self._qmp.disconnect()

    async def _watch_events(self) -> None:
        with self._qmp.listener(("SHUTDOWN", "GUEST_PANICKED")) as events:
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
                    await asyncio.sleep(_POLL)
                self._stack.push_async_callback(self.agent.aclose)
                self.hello = await self.agent.hello()
        except TimeoutError as error:
            raise BootError(
                f"The VM's agent did not answer within boot_timeout = {plan.boot_timeout:g} s "
                f"({self._evidence()}); raise boot_timeout if this machine is only slow."
            ) from error
        self.mark("agent answered")

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


def devices(accelerator: str) -> tuple[Path, ...]:
    """The device nodes QEMU needs for `accelerator`."""
    return (Path("/dev/kvm"),) if accelerator == "kvm" else ()


def _pair(stack: AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    ours.setblocking(False)
    return ours, theirs
