"""Sees to it that there is a template for a VM, and not more of them than a disk can bear."""

from __future__ import annotations

import asyncio

from sandbox_kernel.errors import TemplateError
from sandbox_kernel.image.progress import Progress
from sandbox_kernel.image.store import Image, ImageStore
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine import probe
from sandbox_kernel.machine import template as machine_template
from sandbox_kernel.machine.key import key_of
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.template.key import TemplateKey
from sandbox_kernel.template.store import Template, TemplateStore

LIMIT = 8 << 30
"""Bytes on disk of all templates together; the least recently used go first."""
_PATIENCE = 300.0


def ensure(spec: VMSpec, progress: Progress) -> Template:
    """The template for VMs as `spec` has them, made now if there is none; blocks.

    Raises:
        HostError: the image or something else is missing, or there is no room.
        TemplateError: it could not be made, or somebody else is making it.
    """
    return asyncio.run(ensure_in_loop(spec, progress))


def offer(image: str, progress: Progress) -> None:
    """A template of the default size for the image of that name; without one kernels boot, which is noted."""
    try:
        ensure(VMSpec(image=image), progress)
    except TemplateError as error:
        progress.note(str(error))


async def make(store: TemplateStore, key: TemplateKey, image: Image) -> Template | None:
    """Makes the template for `key`, with a closed network where it has one (machine/template.py, `make`).

    Raises:
        HostError, NetworkError, TemplateError: as there.
    """
    from sandbox_kernel.network.addresses import LINKS
    from sandbox_kernel.network.network import Network

    return await machine_template.make(
        store, key, image, _PATIENCE, lambda logs: Network(Cgroup(()), logs, host_loopback=False), LINKS
    )


async def ensure_in_loop(spec: VMSpec, progress: Progress) -> Template:
    """`ensure` for a caller that runs an event loop."""
    image = ImageStore().open(spec.image)
    chosen, _ = await probe.choose(spec.accelerator, image)
    store, key = TemplateStore(), key_of(image, chosen, spec)
    found = store.open(key)
    if found is None:
        with progress.step("starting a kernel to restore others from"):
            found = await make(store, key, image)
        if found is None:
            raise TemplateError(
                f"Somebody else is making the template {key.digest()[:12]} just now; wait until it is there."
            )
        store.collect(LIMIT)
    return found
