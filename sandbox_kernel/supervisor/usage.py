"""What one VM uses, as the host counts it and as its guest does; the guest's figures are its own word.

    host    CPU seconds and memory of QEMU, bytes over disks and network, cells, uptime
    guest   CPU seconds, memory and processes of the kernel's cgroup, the disk where its home is

No figure waits for long: where QEMU or the guest does not answer, its part is missing.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sandbox_kernel.agent.client import Status
from sandbox_kernel.errors import GuestProtocolError, SandboxKernelError
from sandbox_kernel.machine import footprint
from sandbox_kernel.machine.machine import Machine

if TYPE_CHECKING:
    from sandbox_kernel.network.network import Network

_PATIENCE = 2.0


@dataclass(frozen=True)
class Disk:
    """Bytes that the guest has read from its disks, and written to them."""

    read: int
    written: int


@dataclass(frozen=True)
class Traffic:
    """Bytes that the guest has received over its network, and sent."""

    received: int
    sent: int


@dataclass(frozen=True)
class Usage:
    """One VM's use of things.

    Attributes:
        id: the VM's.
        kernel: the kernelspec's name.
        start: how it came to be: cold, restored, pooled.
        state: busy while a cell runs, else idle.
        uptime: seconds since its kernel was started.
        cells: how many have begun.
        supervisor, client: process ids on the host.
        cpu: seconds of CPU of the host.
        memory: bytes of the host's memory that QEMU has for itself.
        memory_peak: bytes; the most that QEMU had in RAM, what it shares with a template included.
        disk: what went to and from the disks; None where QEMU does not answer.
        network: what went over its network; None without one.
        guest: the guest's own figures; None where it does not answer.
        limits: of the VM, by the names of the configuration.
        exposed: its exposed ports, each with `port` of the guest and `address` on the host.
    """

    id: str
    kernel: str
    start: str
    state: str
    uptime: float
    cells: int
    supervisor: int
    client: int
    cpu: float
    memory: int
    memory_peak: int
    disk: Disk | None
    guest: Status | None
    limits: dict[str, Any]
    network: Traffic | None = None
    exposed: list[dict[str, int | str]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """These figures as JSON's types."""
        return asdict(self)


async def of_guest(machine: Machine) -> Status | None:
    """What the guest says, over a connection that nobody else waits for.

    Raises:
        GuestProtocolError: what it says is none of its protocol.
    """
    try:
        async with asyncio.timeout(_PATIENCE):
            agent = await machine.connect_agent(_PATIENCE)
            try:
                return await agent.status()
            finally:
                await agent.aclose()
    except GuestProtocolError:
        raise
    except (OSError, TimeoutError, SandboxKernelError):
        return None


async def of_disk(machine: Machine) -> Disk | None:
    """What QEMU has counted."""
    try:
        async with asyncio.timeout(_PATIENCE):
            return Disk(*await machine.disk_bytes())
    except (OSError, TimeoutError, SandboxKernelError):
        return None


async def of_network(network: Network | None) -> Traffic | None:
    """What the guest's link has counted."""
    if network is None:
        return None
    try:
        async with asyncio.timeout(_PATIENCE):
            return Traffic(*await network.counters())
    except (TimeoutError, SandboxKernelError):
        return None


def of_host(machine: Machine) -> footprint.Footprint:
    """What the host's Linux has counted."""
    return footprint.of_process(machine.process.qemu_pid)
