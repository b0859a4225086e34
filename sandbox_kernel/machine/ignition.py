"""The part of a machine's start that needs no event loop: the vsock device's ends, and QEMU running.

A supervisor does this before it imports all that it needs to talk to a VM: QEMU takes as long to come up as
those imports do.
"""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sandbox_kernel.errors import HostError, TemplateError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine import scratch
from sandbox_kernel.machine.power import Powered, VmmPlan, power_on
from sandbox_kernel.qemu.command import Disks, VsockDevice
from sandbox_kernel.template.store import Template
from sandbox_kernel.vsock.reservation import reserve_cid, unavailable

CID = 3
"""The guest's CID under the userspace device, which each VM has for itself (0 to 2 are reserved)."""


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
        disk: MiB of a scratch disk; 0 for none.
        disk_bandwidth: MiB a second; 0 for any number.
        disk_iops: reads and writes a second; 0 for any number.
        network: whether it is to have a network device, as its template then has.
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
    disk: int = 0
    disk_bandwidth: float = 0.0
    disk_iops: int = 0
    network: bool = False

    def disks(self, scratch_fd: int | None) -> Disks:
        """What QEMU is to have beside the image's disk, with the scratch disk's file at `scratch_fd`."""
        return Disks(scratch_fd, round(self.disk_bandwidth * (1 << 20)), self.disk_iops)

    def vmm(self, device: VsockDevice, state: IO[bytes] | None, scratch_fd: int | None) -> VmmPlan:
        """What QEMU is to be.

        Args:
            device: its vsock.
            state: the template's devices.
            scratch_fd: the scratch disk's file.
        """
        template = self.template
        return VmmPlan(
            self.image,
            self.memory,
            self.vcpus,
            self.accelerator,
            self.logs,
            self.cgroup,
            device,
            template.ram if template else None,
            private=True,
            qemu=template.qemu if template else (),
            state_fd=state.fileno() if state else None,
            linked=self.network,
            disks=self.disks(scratch_fd),
        )


@dataclass
class Ignition:
    """A machine whose QEMU runs, and that nobody talks to yet.

    Attributes:
        plan: what it is.
        vmm: what its QEMU is.
        device: its vsock device.
        near: our end of a userspace device's connection; None for the kernel's device.
        state: the template's devices, open; None for a machine that boots.
        powered: its QEMU.
        taken: whether a `Machine` has taken all of this over.
    """

    plan: MachinePlan
    vmm: VmmPlan
    device: VsockDevice
    near: socket.socket | None
    state: IO[bytes] | None
    powered: Powered
    taken: bool = False

    def abandon(self) -> None:
        """Ends it, unless it has been taken over; idempotent."""
        if self.taken:
            return
        self.taken = True
        self.powered.kill()
        for end in (self.near, self.state):
            if end is not None:
                end.close()


def ignite(plan: MachinePlan) -> Ignition:
    """Starts QEMU, which boots, or waits for a template's devices.

    Raises:
        HostError: QEMU, bubblewrap or something that they need is missing.
        TemplateError: the template is gone; TemplateUnsafeError: this host cannot protect it.
    """
    with ExitStack() as ours, ExitStack() as theirs:
        near = None
        if plan.vsock == "kernel":
            reservation, cid = reserve_cid()
            theirs.enter_context(reservation)
            device = VsockDevice(reservation.fileno(), cid)
        else:
            near, far = socket.socketpair()
            ours.enter_context(near)
            device = VsockDevice(theirs.enter_context(far).fileno())
        try:
            state = ours.enter_context(plan.template.state.open("rb")) if plan.template else None
        except OSError as error:
            raise TemplateError(
                f"The template's state cannot be read ({error}); it is to be made anew."
            ) from error
        scratch_fd = scratch.make(plan.disk) if plan.disk else None
        if scratch_fd is not None:
            theirs.callback(os.close, scratch_fd)
        vmm = plan.vmm(device, state, scratch_fd)
        powered = power_on(vmm)
        ours.pop_all()
    return Ignition(plan, vmm, device, near, state, powered)


def choose_vsock(requested: str) -> tuple[str, str]:
    """Which vsock implementation to use, and why.

    Raises:
        HostError: `kernel` was demanded and is not available.
    """
    missing = unavailable()
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
