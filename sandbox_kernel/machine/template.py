"""Makes a template: boots a VM whose RAM is a file, waits until its kernel is warm, stops and saves it."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Protocol, cast

from qemu.qmp import QMPError

from sandbox_kernel.agent.protocol import JIFFIES, TEMPLATE_WORD, WARM
from sandbox_kernel.errors import GuestError, HostError, TemplateError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.machine import Link
from sandbox_kernel.machine.migration import save
from sandbox_kernel.machine.power import VmmPlan
from sandbox_kernel.machine.vmm import Vmm
from sandbox_kernel.qemu.command import NetworkDevice
from sandbox_kernel.template.key import TemplateKey
from sandbox_kernel.template.store import RAM, STATE, Template, TemplateStore

log = logging.getLogger(__name__)

_QUIT = 5.0
_SETTLE = 1.0
"""Seconds between a warm guest's word and its end: what it still does then, no clone has to do."""
_NICE = 19
_ATTEMPTS = 3


class OwnLink(Link, Protocol):
    """A link that is made for the machine of a template."""

    def begin(self) -> None:
        """Has it made; `tap` waits for it."""

    async def aclose(self) -> None:
        """Ends it; idempotent."""


async def make(
    store: TemplateStore,
    key: TemplateKey,
    image: Image,
    timeout: float,
    link_in: Callable[[Path], OwnLink],
    links: Mapping[str, object],
) -> Template | None:
    """Makes the template for `key`; None while somebody else makes it.

    The machine runs our own programs and the modules to preload, before any user's code, with the lowest
    priority that there is.

    Args:
        store: where it is kept.
        key: what it is for.
        image: the guest image of that digest.
        timeout: seconds until the guest's kernel must be warm.
        link_in: makes the link of a template with a network device; nothing passes through it, and its logs
            lie in the folder that is given.
        links: the guest's addresses there (agent/protocol.py, `network`).

    Raises:
        HostError: something on the host is missing.
        NetworkError: this host does not let us make a network.
        NoSpaceError: there is no room.
        TemplateError: the guest did not come so far.
    """
    with store.make(key) as staging:
        if staging is None:
            return None
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                qemu, keeps_time = await _save(staging, key, image, timeout, link_in, links)
            except HostError:
                store.check_room()
                raise
            if keeps_time:
                break
            log.warning(
                "attempt %d of %d: the guest found no clock but its own ticks, as happens on a busy host; "
                "the last attempt's template is used, and its idle clones cost 3 %% of a CPU each",
                *(attempt, _ATTEMPTS),
            )
        return store.publish(staging, key, qemu)


async def _save(
    staging: Path,
    key: TemplateKey,
    image: Image,
    timeout: float,
    link_in: Callable[[Path], OwnLink],
    links: Mapping[str, object],
) -> tuple[tuple[int, ...], bool]:
    """Boots a VM and saves it in `staging`; QEMU's version, and whether the guest has a clock of its own.

    Linux calibrates its clock while it boots, and gives up where the host leaves it no time. It then ticks
    for ever, 250 times a second (HZ of Debian's kernel), and so does each clone.
    """
    (logs := staging / "logs").mkdir()
    with (staging / RAM).open("wb") as ram:
        ram.truncate(key.memory << 20)
    async with AsyncExitStack() as stack:
        wish: dict[str, object] = {"modules": key.modules}
        nic = None
        if key.network:
            wish["network"] = links
            link = link_in(logs)
            stack.push_async_callback(link.aclose)
            link.begin()
            nic = NetworkDevice(await link.tap(), link.mac)
        word = TEMPLATE_WORD + json.dumps(wish).encode().hex()
        vmm = Vmm(
            VmmPlan(
                image,
                key.memory,
                key.vcpus,
                key.accelerator,
                logs,
                Cgroup(()),
                ram=staging / RAM,
                nic=nic,
                nice=_NICE,
                kernel_arguments=(word,),
            )
        )
        stack.push_async_callback(vmm.aclose)
        vmm.start()
        await vmm.greet(timeout)
        try:
            qemu = await _version(vmm)
            await _until_warm(vmm, timeout)
            keeps_time = JIFFIES not in vmm.console.last_lines()
            await asyncio.sleep(_SETTLE)
            await vmm.qmp.execute("stop")
            await save(vmm.qmp, staging / STATE)
            await _quit(vmm)
        except (QMPError, OSError, TimeoutError, GuestError) as error:
            raise TemplateError(
                f"No template could be made ({error or 'no answer in time'}; console: "
                f"{vmm.console.last_lines()}); kernels boot instead."
            ) from error
    shutil.rmtree(logs)
    return qemu, keeps_time


async def _version(vmm: Vmm) -> tuple[int, ...]:
    """Which version of QEMU it is (QMP, `query-version`)."""
    found = cast(dict[str, Any], await vmm.qmp.execute("query-version"))["qemu"]
    return int(found["major"]), int(found["minor"]), int(found["micro"])


async def _until_warm(vmm: Vmm, timeout: float) -> None:
    warm = asyncio.ensure_future(vmm.console.seen(WARM))
    either: set[asyncio.Future[Any]] = {warm, vmm.process.exited}
    try:
        await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not warm.done():
            raise GuestError("the guest ended" if vmm.process.exited.done() else f"not warm in {timeout:g} s")
    finally:
        warm.cancel()


async def _quit(vmm: Vmm) -> None:
    """Lets QEMU end by itself, so that all of the RAM is in the file."""
    try:
        await vmm.qmp.execute("quit")
    except (QMPError, EOFError):
        pass  # it may be gone before it has answered
    await asyncio.wait({vmm.process.exited}, timeout=_QUIT)
