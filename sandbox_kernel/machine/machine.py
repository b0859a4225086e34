"""A micro-VM from power-on to power-off.

    load    a clone's first half: jailed QEMU (ignition.py) → the template's devices → vsock device
    start   the same, unless it has been done → the guest runs → QMP greeting → guest's agent answers
    ended   a future: why the machine is no more (QEMU died, a protocol was broken, powered off, panicked)
    stop    the reverse of start, written once, run whatever happened before

The machine owns every resource it makes through one AsyncExitStack, and notes each phase of its start.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol, cast

from qemu.qmp import QMPError

from sandbox_kernel import paths
from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.agent.protocol import AGENT_PORT
from sandbox_kernel.errors import (
    BootError,
    GuestError,
    GuestPanicked,
    GuestPoweredOff,
    GuestProtocolError,
    NetworkError,
    SandboxKernelError,
    TemplateError,
    VMMDied,
    VolumeError,
)
from sandbox_kernel.machine.ignition import CID, Ignition
from sandbox_kernel.machine.state import Lifecycle, State
from sandbox_kernel.machine.vmm import Vmm
from sandbox_kernel.qemu.command import (
    NIC,
    nic_backend,
    nic_device,
    plug_in_volume,
    scratch_device,
    volume_name,
    vsock_device,
)
from sandbox_kernel.qemu.script import Script
from sandbox_kernel.trace import Trace
from sandbox_kernel.vsock.host import VsockHost
from sandbox_kernel.vsock.kernel import KernelVsock
from sandbox_kernel.vsock.userspace import UserspaceVsock

log = logging.getLogger(__name__)

_POLL = 0.05
_POLL_RESTORED = 0.002
_ATTEMPT = 5.0
_PANIC = "Kernel panic - not syncing"
"""Linux' words (kernel/panic.c); it then reboots at once, which is all that QEMU sees."""
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))
"""QEMU says of some disks only by these words that the host has no room."""
_SEEN = 1.0
"""Seconds until QEMU's end is seen after the streams to its guest have broken."""


class Link(Protocol):
    """The host's end of a network device."""

    @property
    def mac(self) -> str:
        """The address that the device is to have."""

    async def tap(self) -> int:
        """The tap's descriptor, which stays the link's; waits until it may be used."""


class Machine:
    """One micro-VM; start it once, stop it always."""

    def __init__(self, ignition: Ignition, trace: Trace | None = None, link: Link | None = None) -> None:
        """Takes over a QEMU that runs.

        Args:
            ignition: what has been started.
            trace: where the phases of the start are noted.
            link: of the network device; None for a machine without.
        """
        self._link = link
        self._ignition = ignition
        self._plan = ignition.plan
        self._trace = trace or Trace()
        self._lifecycle = Lifecycle()
        self._script: Script | None = None
        self._stack = AsyncExitStack()
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended: asyncio.Future[SandboxKernelError] = asyncio.get_running_loop().create_future()
        """Resolved once with the reason when the machine is no more of use."""
        self.running = asyncio.Event()
        """The guest runs: it boots, or goes on from its template."""
        self.on_trouble: Callable[[str], None] = log.warning
        """Told, in a sentence, what went wrong on the host and did not end the VM."""
        self._told_of_disk = False
        self._volumes: list[str] = []

    agent: AgentClient
    """Set by `start`."""

    @property
    def restored(self) -> bool:
        """Whether it goes on from a template."""
        return self._plan.template is not None

    @property
    def state(self) -> State:
        """Where this machine stands."""
        return self._lifecycle.state

    async def load(self) -> None:
        """Has QEMU load the devices of its template; `start` then lets the guest run.

        Raises:
            TemplateError: QEMU did not take the state; TemplateUnsafeError: nor its RAM.
        """
        try:
            self._attend()
            await self._load()
        except BaseException:
            await self.stop()
            raise

    async def start(self) -> None:
        """Boots or restores the guest until its agent has answered.

        Raises:
            BootError: the deadline passed; the message has the console's last lines and the logs' folder.
            GuestError: QEMU or the guest ended on the way.
            HostError: something on the host is missing.
            TemplateError: the template cannot be restored; TemplateUnsafeError: not on this host.
        """
        try:
            self._attend()
            if self.restored:
                await self._load()
                await self._run()
            self.running.set()
            # A clone comes up by itself; QMP is for what happens later.
            greeting = asyncio.create_task(self._greet())
            self._stack.callback(greeting.cancel)
            if not self.restored:
                await greeting
            await self._reach_agent()
            await greeting
            if not self.restored and self._link is not None:
                await self._connect(self._link)
        except BaseException:
            await self.stop()
            raise
        self._lifecycle.move(State.READY)

    async def connect_agent(self, timeout: float = _ATTEMPT) -> AgentClient:
        """One more connection to the agent: calls on one connection wait for each other."""
        return AgentClient(await self.vsock.connect(AGENT_PORT, timeout))

    async def plug_in(self, name: str, fd: int, writable: bool) -> str:
        """Plugs a volume into the guest, which runs and has yet to look for it.

        Args:
            name: the volume's, for people.
            fd: its file, opened for writing only if `writable`; stays the caller's.
            writable: whether the guest may write to it.

        Returns:
            The serial number by which the guest knows it.

        Raises:
            VolumeError: QEMU does not take it.
        """
        number = len(self._volumes)
        self._volumes.append(name)
        qmp, throttled = self._vmm.qmp, bool(self._ignition.vmm.disks.throttle)
        try:
            qmp.send_fd_scm(fd)
            for command, arguments in plug_in_volume(number, writable, throttled):
                await qmp.execute(command, arguments)
        except (QMPError, EOFError, OSError) as error:
            raise VolumeError(
                f"The volume {name} could not be plugged into the VM ({error}); logs: {self._plan.logs}."
            ) from error
        return volume_name(number)

    async def disk_bytes(self) -> tuple[int, int]:
        """Bytes that the guest has read from its disks, and written to them (QMP, `query-blockstats`).

        Raises:
            GuestError: QEMU does not tell.
        """
        try:
            devices = cast(list[dict[str, Any]], await self._vmm.qmp.execute("query-blockstats"))
            read = sum(int(device["stats"]["rd_bytes"]) for device in devices)
            return read, sum(int(device["stats"]["wr_bytes"]) for device in devices)
        except (QMPError, EOFError, LookupError, TypeError, ValueError) as error:
            raise GuestError(f"QEMU does not tell what its disks did ({error}).") from error

    async def reachable_agent(self) -> AgentClient:
        """The agent, over a new connection where the last one is of no more use, as after a call in vain.

        Raises:
            GuestError: it cannot be connected to.
        """
        if not self.agent.usable:
            try:
                self.agent = await self.connect_agent()
            except OSError as error:
                raise GuestError(
                    f"The VM's agent cannot be reached ({error}); restart the kernel."
                ) from error
            self._stack.push_async_callback(self.agent.aclose)
        return self.agent

    async def cause_of(self, error: SandboxKernelError) -> SandboxKernelError:
        """Why a call to the guest failed: `error`, or the VM's own end.

        When QEMU dies, the host's kernel resets its vsock streams before anybody can see that it is dead.
        """
        if isinstance(error, GuestError) and not isinstance(error, GuestProtocolError):
            await asyncio.wait({self.ended}, timeout=_SEEN)
            if self.ended.done():
                return self.ended.result()
        return error

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

    def _attend(self) -> None:
        """Begins to serve what QEMU waits for as it comes up, unless that has been done."""
        if self.state is not State.NEW:
            return
        ignition = self._ignition
        ignition.taken = True
        self._lifecycle.move(State.BOOTING)
        if ignition.state is not None:
            self._stack.enter_context(ignition.state)
        self._vmm = Vmm(ignition.vmm, ignition.powered)
        self._stack.push_async_callback(self._vmm.aclose)
        self._vmm.start()
        self.process = self._vmm.process
        self.vsock: VsockHost = _vsock_host(ignition)
        self._stack.push_async_callback(self.vsock.aclose)
        if self.restored and isinstance(self.vsock, UserspaceVsock):
            self.vsock.reach_memory_of(self.process.qemu_pid)
        self.process.exited.add_done_callback(lambda _: self._on_exit())
        self.vsock.failed.add_done_callback(self._on_violation)

    async def _load(self) -> None:
        """Waits until QEMU has loaded the devices of its template, unless it has.

        Raises:
            TemplateError: QEMU did not take the state; TemplateUnsafeError: nor its RAM.
        """
        if self._script is None:
            assert self._ignition.powered.script is not None
            self._script = Script(self._ignition.powered.script)
            if self._link is not None:
                await self._connect_first(self._script, self._link)
            await self._until(self._script, "loaded")
            self._trace.mark("devices restored")
            with suppress(OSError):  # of a QEMU that is gone the next step tells
                self._script.plug_in({**dict(vsock_device(self._ignition.device)), "id": "vsock"})
                if self._plan.disk:
                    disks = self._ignition.vmm.disks
                    self._script.plug_in({**dict(scratch_device(disks)), "id": "scratch"})

    async def _connect_first(self, script: Script, link: Link) -> None:
        """Plugs in the network device of a machine whose template has one, and has it load that."""
        assert self._ignition.state is not None
        tap = await link.tap()
        with suppress(OSError):  # of a QEMU that is gone the next step tells
            script.connect(NIC, tap, nic_backend(), {**dict(nic_device(link.mac)), "id": NIC})
            script.load(self._ignition.state.fileno())

    async def _connect(self, link: Link) -> None:
        """Plugs the network device into a machine that has booted.

        Raises:
            NetworkError: QEMU does not take it.
        """
        qmp = self._vmm.qmp
        try:
            qmp.send_fd_scm(await link.tap())
            await qmp.execute("getfd", {"fdname": NIC})
            await qmp.execute("netdev_add", dict(nic_backend()))
            await qmp.execute("device_add", {**dict(nic_device(link.mac)), "id": NIC})
        except (QMPError, OSError) as error:
            raise _no_nic(str(error)) from error

    async def _run(self) -> None:
        """Lets the guest run, and tells its agent so: there is a device to be looked for.

        Raises:
            TemplateError: QEMU did not do it.
        """
        assert self._script is not None
        assert self._ignition.powered.script is not None

        def go_on() -> None:
            assert self._script is not None
            self._script.go_on()
            self._vmm.type("")

        await self._until(self._script, "running", go_on)
        self._ignition.powered.script.close()
        self._trace.mark("guest runs")

    async def _until(self, script: Script, done: str, begin: Callable[[], None] | None = None) -> None:
        """Calls `begin` and waits for what `done` names; ends QEMU if it does not come."""
        try:
            async with asyncio.timeout(self._plan.boot_timeout):
                if begin is not None:
                    begin()
                await self._follow(script, done)
        except (TimeoutError, OSError) as error:
            script.error = script.error or str(error) or "no answer in time"
        if getattr(script, done) and not script.error:
            return
        await self.process.kill()
        if script.refused:
            raise _no_nic(script.refused)
        self.process.check_ram()
        template = self._plan.template
        assert template is not None
        raise TemplateError(
            f"QEMU did not restore the template {template.digest} "
            f"({script.error or self.process.last_words() or 'it ended'}); it is to be made anew."
        )

    async def _follow(self, script: Script, done: str) -> None:
        """Waits for what `done` names, or for a reason why it will not come."""
        script.look()
        while not (getattr(script, done) or script.error or self.process.exited.done()):
            await asyncio.sleep(_POLL_RESTORED)
            script.look()

    async def _greet(self) -> None:
        """Waits for QEMU's greeting; from then on its events are seen."""
        await self._vmm.greet(self._plan.boot_timeout)
        task = asyncio.create_task(self._watch_events(), name="qmp-events")
        self._tasks.add(task)
        self._stack.callback(task.cancel)
        self._trace.mark("QEMU answered")

    async def _watch_events(self) -> None:
        with self._vmm.qmp.listener(("SHUTDOWN", "GUEST_PANICKED", "BLOCK_IO_ERROR")) as events:
            async for event in events:
                data = cast(dict[str, object], event.get("data", {}))
                if event["event"] == "BLOCK_IO_ERROR":
                    self._on_disk_error(data)
                    continue
                reason = str(data.get("reason", ""))[:40]
                panicked = event["event"] == "GUEST_PANICKED" or reason == "guest-panic"
                if panicked or self._vmm.console.said(_PANIC):
                    self._end(GuestPanicked(f"The VM's Linux panicked ({self._evidence()})."))
                else:
                    self._end(GuestPoweredOff(f"The VM powered off ({self._evidence()})."))

    def _on_disk_error(self, data: Mapping[str, object]) -> None:
        """The host could not read or write a disk of the VM; the guest has been told, a person is to be."""
        if self._told_of_disk:
            return
        self._told_of_disk = True
        reason = str(data.get("reason", ""))[:200]
        if data.get("nospace") is True or reason in _FULL:
            what, where, fix = (
                "The VM's scratch disk",
                paths.cache_dir(),
                " and write the kernel's last files anew",
            )
            for number, name in enumerate(self._volumes):
                if str(data.get("node-name")).startswith(volume_name(number)):
                    what, where = f"The volume {name}", paths.data_dir()
                    fix = ", restart the kernel and write its last files anew"  # its journal may have ended
            self.on_trouble(
                f"{what} could not be written to, as the host's disk is full ({reason}: {where}); make room "
                f"there{fix}."
            )
        else:
            self.on_trouble(
                f"A disk of the VM could not be used ({reason}); look after the host's disk and write the "
                "kernel's last files anew."
            )

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
        self._end(VMMDied(f"QEMU {how}{': ' + words if words else ''} ({self._evidence()})."))

    def _on_violation(self, failed: asyncio.Future[GuestProtocolError]) -> None:
        if not failed.cancelled():
            self._end(
                GuestProtocolError(
                    f"The VM broke the protocol of its vsock device ({failed.result()}) and was ended; "
                    f"restart the kernel ({self._evidence()})."
                )
            )

    def _end(self, reason: SandboxKernelError) -> None:
        if not self.ended.done() and self.state in (State.BOOTING, State.READY):
            log.warning("%s", reason)
            self.ended.set_result(reason)

    def _evidence(self) -> str:
        console = self.console_tail()
        return f"console: {console}; logs: {self._plan.logs}" if console else f"logs: {self._plan.logs}"


def _vsock_host(ignition: Ignition) -> VsockHost:
    """The host's side of a machine's vsock."""
    if ignition.near is not None:
        return UserspaceVsock(CID, connection=ignition.near)
    assert ignition.device.kernel_cid is not None
    return KernelVsock(ignition.device.kernel_cid)


def _no_nic(said: str) -> NetworkError:
    return NetworkError(
        f"QEMU does not take the VM's network device ({said}); look at its version and at its log."
    )
