"""What others of this user may ask of a VM (window.py): each by its name, with what its answer has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from sandbox_kernel.exposure import parse as parse_exposure
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.mount import parse
from sandbox_kernel.supervisor import copies
from sandbox_kernel.supervisor.network_policy import NetworkPolicy
from sandbox_kernel.supervisor.ports import Ports
from sandbox_kernel.supervisor.shares import Shares
from sandbox_kernel.supervisor.usage import Usage
from sandbox_kernel.supervisor.window import Handover, Operation


def operations(
    machine: Machine,
    shares: Shares,
    ports: Ports,
    policy: NetworkPolicy,
    logs: str,
    usage: Callable[[], Awaitable[Usage]],
    costs_the_vm: Callable[[], AbstractContextManager[None]],
) -> dict[str, Operation]:
    """The operations of one VM.

    Args:
        machine: it.
        shares: its mounts.
        ports: those of its ports that are exposed.
        policy: of its network.
        logs: folder of its logs.
        usage: what it uses.
        costs_the_vm: within it, a guest that breaks a protocol loses its VM.
    """

    async def look(request: Mapping[str, Any]) -> dict[str, Any]:
        return {"usage": (await usage()).to_dict()}

    async def mount(request: Mapping[str, Any]) -> dict[str, Any]:
        await shares.add(parse(str(request.get("mount"))))
        return {}

    async def unmount(request: Mapping[str, Any]) -> dict[str, Any]:
        await shares.remove(str(request.get("target")))
        return {}

    async def mounts(request: Mapping[str, Any]) -> dict[str, Any]:
        return {"mounts": [str(each) for each in shares.mounts]}

    async def where(request: Mapping[str, Any]) -> dict[str, Any]:
        return {"logs": logs}

    async def expose(request: Mapping[str, Any]) -> dict[str, Any]:
        return {"address": ports.add(parse_exposure(str(request.get("port")))).address}

    async def unexpose(request: Mapping[str, Any]) -> dict[str, Any]:
        await ports.remove(parse_exposure(str(request.get("port"))))
        return {}

    async def copy(request: Mapping[str, Any]) -> Handover:
        with costs_the_vm():
            return Handover(await copies.begin(machine, request))

    return {
        "usage": look,
        "logs": where,
        "mount": mount,
        "unmount": unmount,
        "mounts": mounts,
        "network": policy.change,
        "expose": expose,
        "unexpose": unexpose,
        "copy": copy,
    }
