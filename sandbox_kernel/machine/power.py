"""Switches a VMM on: QEMU's process, and the near ends of what it talks to. Needs no event loop."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.accelerator import INSTALL
from sandbox_kernel.machine.spawn import Spawned, spawn
from sandbox_kernel.qemu.command import (
    NO_DISKS,
    READ_ONLY_RAM,
    Disks,
    NetworkDevice,
    QemuConfig,
    TemplateRam,
    VsockDevice,
    command_line,
)
from sandbox_kernel.qemu.script import script as restore_script


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
        state_fd: a template's devices, for QEMU to load when it is up; None for a machine that boots.
        linked: whether it gets a network device before it loads them, and so does not by itself.
        nic: a network device that it has from the start; None for none.
        kernel_arguments: further words for the guest kernel's command line.
        nice: added to its niceness.
        disks: scratch disk and limits.
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
    state_fd: int | None = None
    linked: bool = False
    nic: NetworkDevice | None = None
    kernel_arguments: tuple[str, ...] = ()
    nice: int = 0
    disks: Disks = NO_DISKS


@dataclass(frozen=True)
class Powered:
    """A QEMU that runs, and that nobody talks to yet.

    Attributes:
        spawned: the process.
        qmp: our end of its QMP socket.
        console: our end of the guest's serial console.
        script: our end of a clone's script; None for a machine that boots.
    """

    spawned: Spawned
    qmp: socket.socket
    console: socket.socket
    script: socket.socket | None

    def kill(self) -> None:
        """Ends a QEMU that no `Vmm` has taken over."""
        self.spawned.kill()
        for end in (self.qmp, self.console, self.script):
            if end is not None:
                end.close()


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
        script = qemu_script = None
        if plan.state_fd is not None:
            script, qemu_script = _pair(ours, theirs)
            script.sendall(restore_script(plan.state_fd, complete=not plan.linked))
        config = QemuConfig(
            binary=PurePosixPath(qemu),
            image=bubblewrap.IMAGE,
            memory=plan.memory,
            vcpus=plan.vcpus,
            accelerator=plan.accelerator,
            console_fd=qemu_console.fileno(),
            qmp_fd=qemu_qmp.fileno(),
            script_fd=qemu_script.fileno() if qemu_script is not None else None,
            vsock=plan.vsock,
            nic=plan.nic,
            kernel_arguments=plan.kernel_arguments,
            template=TemplateRam(bubblewrap.RAM, plan.private, read_only) if plan.ram is not None else None,
            disks=plan.disks,
        )
        jail = bubblewrap.Jail(
            bwrap, qemu, plan.image.directory, devices(plan.accelerator), plan.ram, not plan.private
        )
        fds = [end.fileno() for end in (qemu_console, qemu_qmp, qemu_script) if end is not None]
        if plan.state_fd is not None:
            fds.append(plan.state_fd)
        if plan.vsock is not None:
            fds.append(plan.vsock.fd)
        if plan.nic is not None:
            fds.append(plan.nic.fd)
        if plan.disks.scratch_fd is not None:
            fds.append(plan.disks.scratch_fd)
        lender = None
        if plan.ram is not None and plan.private and not read_only:
            # With ctypes, 1.4 ms of import that nobody else has to wait for.
            from sandbox_kernel.jail.lender import Lender

            lender = Lender(bubblewrap.RAM)
        spawned = spawn(jail, command_line(config), fds, plan.cgroup, plan.nice, lender)
        ours.pop_all()
    return Powered(spawned, qmp, console, script)


def devices(accelerator: str) -> tuple[Path, ...]:
    """The device nodes QEMU needs for `accelerator`."""
    return (Path("/dev/kvm"),) if accelerator == "kvm" else ()


def _pair(ours: ExitStack, theirs: ExitStack) -> tuple[socket.socket, socket.socket]:
    near, far = socket.socketpair()
    near.setblocking(False)
    return ours.enter_context(near), theirs.enter_context(far)
