"""QEMU from the start of its process to the end of it: jail, console, QMP. What it runs is the caller's.

start    socketpairs → jailed process → QMP greeting
close    the reverse; the process is killed, whatever it does
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qemu.qmp import QMPClient, QMPError

from sandbox_kernel.errors import HostError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.process import QemuProcess
from sandbox_kernel.machine.spawn import spawn
from sandbox_kernel.machine.transcript import Transcript
from sandbox_kernel.qemu.command import READ_ONLY_RAM, QemuConfig, TemplateRam, VsockDevice, command_line

INSTALL = "install it with `sandbox-kernel setup`"
_QUIT = 0.5


@dataclass(frozen=True)
class VmmPlan:
    """What QEMU is to be.

    Attributes:
        image: the guest image.
        memory: RAM in MiB.
        vcpus: virtual CPUs.
        accelerator: `kvm` or `tcg`.
        logs: folder for `console.log` and `qemu.log`.
        cgroup: joined by QEMU before its first instruction.
        vsock: the vsock device; None for none.
        ram: a template's RAM; None for RAM of its own.
        private: whether writes to `ram` stay with this QEMU, which then waits to be restored, and whose jail
            has the file read-only.
        qemu: version of QEMU, for private RAM; without one the oldest that there is.
        inherit: further descriptors that QEMU keeps, same number.
        kernel_arguments: further words for the guest kernel's command line.
        nice: added to its niceness.
    """

    image: Image
    memory: int
    vcpus: int
    accelerator: str
    logs: Path
    cgroup: Cgroup
    vsock: VsockDevice | None = None
    ram: Path | None = None
    private: bool = False
    qemu: tuple[int, ...] = ()
    inherit: Sequence[int] = ()
    kernel_arguments: tuple[str, ...] = ()
    nice: int = 0


class Vmm:
    """A running QEMU."""

    def __init__(self, plan: VmmPlan) -> None:
        """Nothing yet; see `start`."""
        self._plan = plan
        self._stack = AsyncExitStack()
        self.qmp = QMPClient("sandbox-kernel")
        self.qmp.logger.setLevel(logging.CRITICAL)  # it logs a peer's death as an error; we report it better

    async def start(self) -> None:
        """Starts QEMU's process; `greet` comes next.

        Raises:
            HostError: QEMU, bubblewrap or something that they need is missing.
            TemplateUnsafeError: this host cannot protect the RAM's file from this QEMU.
        """
        plan = self._plan
        read_only = plan.private and plan.qemu >= READ_ONLY_RAM
        qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
        bwrap = bubblewrap.find("bwrap", INSTALL)
        self._qmp_socket, qemu_qmp = _pair(self._stack)
        self._console, qemu_console = _pair(self._stack)
        config = QemuConfig(
            binary=PurePosixPath(qemu),
            image=bubblewrap.IMAGE,
            memory=plan.memory,
            vcpus=plan.vcpus,
            accelerator=plan.accelerator,
            console_fd=qemu_console.fileno(),
            qmp_fd=qemu_qmp.fileno(),
            vsock=plan.vsock,
            kernel_arguments=plan.kernel_arguments,
            template=TemplateRam(bubblewrap.RAM, plan.private, read_only) if plan.ram is not None else None,
        )
        self.console = Transcript(self._console.dup().detach(), plan.logs / "console.log")
        self._stack.callback(self.console.close)
        jail = bubblewrap.Jail(
            bwrap, qemu, plan.image.directory, devices(plan.accelerator), plan.ram, not plan.private
        )
        fds = [qemu_console.fileno(), qemu_qmp.fileno(), *plan.inherit]
        if plan.vsock is not None:
            fds.append(plan.vsock.fd)
        lender = None
        if plan.ram is not None and plan.private and not read_only:
            # With ctypes, 1.4 ms of import that nobody else has to wait for.
            from sandbox_kernel.jail.lender import Lender

            lender = Lender(bubblewrap.RAM)
        spawned = spawn(jail, command_line(config), fds, lender)
        self.process = await QemuProcess.start(spawned, plan.cgroup, plan.logs / "qemu.log", plan.nice)
        self._stack.push_async_callback(self.process.kill)
        for end in (qemu_qmp, qemu_console):
            end.close()

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


def devices(accelerator: str) -> tuple[Path, ...]:
    """The device nodes QEMU needs for `accelerator`."""
    return (Path("/dev/kvm"),) if accelerator == "kvm" else ()


def _pair(stack: AsyncExitStack) -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(theirs.close)
    ours.setblocking(False)
    return ours, theirs
