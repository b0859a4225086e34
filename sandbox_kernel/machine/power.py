"""Switches a VMM on: QEMU's process, and the near ends of what it talks to. Needs no event loop."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.accelerator import INSTALL
from sandbox_kernel.machine.spawn import Spawned, spawn
from sandbox_kernel.qemu.command import READ_ONLY_RAM, QemuConfig, TemplateRam, VsockDevice, command_line


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


@dataclass(frozen=True)
class Powered:
    """A QEMU that runs, and that nobody talks to yet.

    Attributes:
        spawned: the process.
        qmp: our end of its QMP socket.
        console: our end of the guest's serial console.
    """

    spawned: Spawned
    qmp: socket.socket
    console: socket.socket

    def kill(self) -> None:
        """Ends a QEMU that no `Vmm` has taken over."""
        self.spawned.kill()
        self.qmp.close()
        self.console.close()


def power_on(plan: VmmPlan) -> Powered:
    """Starts QEMU.

    Raises:
        HostError: QEMU, bubblewrap or something that they need is missing.
        TemplateUnsafeError: this host cannot protect the RAM's file from this QEMU.
    """
    read_only = plan.private and plan.qemu >= READ_ONLY_RAM
    qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
    bwrap = bubblewrap.find("bwrap", INSTALL)
    with ExitStack() as ours, ExitStack() as theirs:
        qmp, qemu_qmp = _pair(ours, theirs)
        console, qemu_console = _pair(ours, theirs)
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
        spawned = spawn(jail, command_line(config), fds, plan.cgroup, plan.nice, lender)
        ours.pop_all()
    return Powered(spawned, qmp, console)


def devices(accelerator: str) -> tuple[Path, ...]:
    """The device nodes QEMU needs for `accelerator`."""
    return (Path("/dev/kvm"),) if accelerator == "kvm" else ()


def _pair(ours: ExitStack, theirs: ExitStack) -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.setblocking(False)
    return ours.enter_context(near), theirs.enter_context(far)
