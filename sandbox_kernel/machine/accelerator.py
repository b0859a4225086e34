"""Which accelerator a VM gets: KVM where it has been seen to work, TCG (software emulation) elsewhere.

That /dev/kvm exists and opens says little: inside some clouds' VMs it makes machines that hang or run a
thousand times too slowly. So the verdict comes from booting the real guest kernel to its userspace, in the
real jail, within a deadline. It is taken once, kept in the cache with what it was taken for (host kernel,
CPU, QEMU, image), and taken again when any of these changes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import platform
import socket
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from sandbox_kernel import paths
from sandbox_kernel.errors import AcceleratorError, HostError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.process import QemuProcess
from sandbox_kernel.machine.spawn import spawn
from sandbox_kernel.machine.transcript import Transcript
from sandbox_kernel.qemu.command import QemuConfig, command_line

DEVICE = Path("/dev/kvm")
DEADLINE = 30.0
"""Seconds for the guest kernel to reach userspace; it takes one on hardware and twenty in a nested VM."""
INSTALL = "install it with `sandbox-kernel setup`"
_PROBE_MEMORY = 256
_SUCCESS = "SANDBOX-KERNEL-PROBE-OK"


@dataclass(frozen=True)
class Verdict:
    """What a probe of KVM found.

    Attributes:
        usable: whether the guest kernel reached its userspace in time.
        reason: what happened, as the end of a sentence.
        seconds: how long that took.
    """

    usable: bool
    reason: str
    seconds: float


def unavailable(device: Path = DEVICE) -> str | None:
    """Why KVM need not even be probed; None when it can be."""
    if not device.exists():
        return f"{device} does not exist"
    if not os.access(device, os.R_OK | os.W_OK):
        return f"user {os.getuid()} may not open {device}"
    return None


def cached(image: Image) -> Verdict | None:
    """The verdict kept for this host, this QEMU and this image; None when there is none."""
    try:
        stored = json.loads(_verdict_file().read_text())
        if stored["for"] != _circumstances(image):
            return None
        return Verdict(bool(stored["usable"]), str(stored["reason"]), float(stored["seconds"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def probe(image: Image, timeout: float = DEADLINE) -> Verdict:
    """Boots the guest kernel under KVM, keeps the verdict in the cache and returns it; blocks.

    Raises:
        HostError: QEMU or bubblewrap is missing or cannot be started at all.
    """
    return asyncio.run(probe_in_loop(image, timeout))


async def probe_in_loop(image: Image, timeout: float = DEADLINE) -> Verdict:
    """`probe` for a caller that runs an event loop."""
    missing = unavailable()
    if missing:
        return Verdict(False, missing, 0.0)
    verdict = await _boot(image, timeout)
    file = _verdict_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps({"for": _circumstances(image), **dataclasses.asdict(verdict)}))
    fresh.replace(file)
    return verdict


async def choose(requested: str, image: Image) -> tuple[str, str]:
    """The accelerator to use and the reason for the choice.

    Args:
        requested: `auto`, `kvm` or `tcg`.
        image: whose kernel is booted when no verdict is cached.

    Raises:
        AcceleratorError: `kvm` was demanded and does not work.
    """
    if requested == "tcg":
        return "tcg", "asked for"
    verdict = await _verdict(image)
    if verdict.usable:
        return "kvm", verdict.reason
    if requested == "kvm":
        raise AcceleratorError(
            f"The accelerator 'kvm' was demanded and cannot be used: {verdict.reason}; mend that and run "
            "`sandbox-kernel doctor --probe`, or choose accelerator = 'auto'."
        )
    return "tcg", verdict.reason


async def _verdict(image: Image) -> Verdict:
    missing = unavailable()
    if missing:
        return Verdict(False, missing, 0.0)
    return cached(image) or await probe_in_loop(image)


async def _boot(image: Image, timeout: float) -> Verdict:
    began = time.monotonic()
    qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
    jail = bubblewrap.Jail(bubblewrap.find("bwrap", INSTALL), qemu, image.directory, (DEVICE,))
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
            spawned = spawn(jail, command_line(config), (theirs.fileno(),))
            process = await QemuProcess.start(spawned, Cgroup(()), Path(folder) / "qemu.log")
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
            return Verdict(True, f"the guest kernel booted in {seconds:.1f} s under {DEVICE}", seconds)
        if not in_time:
            late = f"the guest kernel did not reach userspace within {timeout:g} s under {DEVICE}"
            return Verdict(False, late, seconds)
        words = process.last_words().split(" | ")[0] or console.last_lines(1) or "no message"
        return Verdict(False, f"QEMU ended under {DEVICE} with: {words[:200]}", seconds)


def _verdict_file() -> Path:
    return paths.cache_dir() / "accelerator.json"


def _circumstances(image: Image) -> str:
    """A digest of everything that the verdict depends on."""
    qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
    found = qemu.stat()
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    facts = [platform.release(), cpu, str(qemu), found.st_size, found.st_mtime_ns, image.digest]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
