"""Finds out whether KVM works: boots the real guest kernel to its userspace, in the real jail, in time."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import time
from pathlib import Path, PurePosixPath
from typing import Any

from sandbox_kernel.errors import HostError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine import accelerator
from sandbox_kernel.machine.accelerator import INSTALL, Verdict
from sandbox_kernel.machine.process import QemuProcess
from sandbox_kernel.machine.spawn import spawn
from sandbox_kernel.machine.transcript import Transcript
from sandbox_kernel.qemu.command import QemuConfig, command_line

DEADLINE = 30.0
"""Seconds for the guest kernel to reach userspace; it takes one on hardware and twenty in a nested VM."""
_PROBE_MEMORY = 256
_SUCCESS = "SANDBOX-KERNEL-PROBE-OK"


def probe(image: Image, timeout: float = DEADLINE) -> Verdict:
    """Boots the guest kernel under KVM, keeps the verdict in the cache and returns it; blocks.

    Raises:
        HostError: QEMU or bubblewrap is missing or cannot be started at all.
    """
    return asyncio.run(probe_in_loop(image, timeout))


async def probe_in_loop(image: Image, timeout: float = DEADLINE) -> Verdict:
    """`probe` for a caller that runs an event loop."""
    missing = accelerator.unavailable()
    if missing:
        return Verdict(False, missing, 0.0)
    verdict = await _boot(image, timeout)
    accelerator.keep(verdict, image)
    return verdict


async def choose(requested: str, image: Image) -> tuple[str, str]:
    """`accelerator.settle`, after a probe where one is due.

    Raises:
        AcceleratorError: `kvm` was demanded and does not work.
    """
    settled = accelerator.settle(requested, image)
    return settled or accelerator.choice(requested, await probe_in_loop(image))


async def _boot(image: Image, timeout: float) -> Verdict:
    began = time.monotonic()
    qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
    jail = bubblewrap.Jail(bubblewrap.find("bwrap", INSTALL), qemu, image.directory, (accelerator.DEVICE,))
    with tempfile.TemporaryDirectory(prefix="sandbox-kernel-probe-") as folder:
        ours, theirs = socket.socketpair()
        console = Transcript(ours.detach(), Path(folder) / "console.log")
        config = QemuConfig(
            binary=PurePosixPath(qemu),
            image=bubblewrap.IMAGE,
            memory=_PROBE_MEMORY,
            vcpus=1,
            accelerator="kvm",
            console_fd=theirs.fileno(),
            kernel_arguments=("sandbox.probe",),
        )
        try:
            spawned = spawn(jail, command_line(config), (theirs.fileno(),), Cgroup(()))
            process = QemuProcess(spawned, Path(folder) / "qemu.log")
            theirs.close()
            try:
                success = asyncio.ensure_future(console.seen(_SUCCESS))
                either: set[asyncio.Future[Any]] = {success, process.exited}
                await asyncio.wait(either, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                success.cancel()
                in_time = success.done() or process.exited.done()
            finally:
                await process.kill()
        except HostError as error:
            return Verdict(False, f"the probe could not run ({error})", time.monotonic() - began)
        finally:
            theirs.close()
            console.close()
        seconds = time.monotonic() - began
        if _SUCCESS in console.last_lines():
            return Verdict(
                True, f"the guest kernel booted in {seconds:.1f} s under {accelerator.DEVICE}", seconds
            )
        if not in_time:
            late = f"the guest kernel did not reach userspace within {timeout:g} s under {accelerator.DEVICE}"
            return Verdict(False, late, seconds)
        words = process.last_words().split(" | ")[0] or console.last_lines(1) or "no message"
        return Verdict(False, f"QEMU ended under {accelerator.DEVICE} with: {words[:200]}", seconds)
