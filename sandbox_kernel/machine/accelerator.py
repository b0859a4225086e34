"""Which accelerator a VM gets: KVM where it has been seen to work, TCG (software emulation) elsewhere.

That /dev/kvm exists and opens says little: inside some clouds' VMs it makes machines that hang or run a
thousand times too slowly. So the verdict comes from booting the real guest kernel to its userspace, in the
real jail, within a deadline. It is taken once, kept in the cache with what it was taken for (host kernel,
CPU, QEMU, image), and taken again when any of these changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import AcceleratorError
from sandbox_kernel.image.store import Image
from sandbox_kernel.jail import bubblewrap

log = logging.getLogger(__name__)

DEVICE = Path("/dev/kvm")
INSTALL = "install it with `sandbox-kernel setup`"
_KEPT = 16
"""Verdicts kept; one for each image in use is enough."""


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
        stored = _stored()[_circumstances(image)]
        return Verdict(bool(stored["usable"]), str(stored["reason"]), float(str(stored["seconds"])))
    except (ValueError, KeyError, TypeError):
        return None


def keep(verdict: Verdict, image: Image) -> None:
    """Keeps a verdict for `cached`, and the latest of other images; where there is no room, says so."""
    key = _circumstances(image)
    others = [(name, stored) for name, stored in _stored().items() if name != key]
    file = _verdict_file()
    fresh = file.with_suffix(f".{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps({**dict(others[1 - _KEPT :]), key: dataclasses.asdict(verdict)}))
        fresh.replace(file)
    except OSError as error:
        log.warning(
            "whether KVM works is found out anew at each start, as it cannot be kept in %s (%s)",
            *(file.parent, error.strerror),
        )
        with contextlib.suppress(OSError):
            fresh.unlink()


def settle(requested: str, image: Image) -> tuple[str, str] | None:
    """The accelerator to use and the reason for the choice; None when that takes a probe (`probe.py`) first.

    Args:
        requested: `auto`, `kvm` or `tcg`.
        image: the guest image.

    Raises:
        AcceleratorError: `kvm` was demanded and does not work.
    """
    if requested == "tcg":
        return "tcg", "asked for"
    missing = unavailable()
    verdict = Verdict(False, missing, 0.0) if missing else cached(image)
    return None if verdict is None else choice(requested, verdict)


def choice(requested: str, verdict: Verdict) -> tuple[str, str]:
    """`settle`, with the verdict that it lacked.

    Raises:
        AcceleratorError: `kvm` was demanded and does not work.
    """
    if verdict.usable:
        return "kvm", verdict.reason
    if requested == "kvm":
        raise AcceleratorError(
            f"The accelerator 'kvm' was demanded and cannot be used: {verdict.reason}; mend that and run "
            "`sandbox-kernel doctor --probe`, or choose accelerator = 'auto'."
        )
    return "tcg", verdict.reason


def _stored() -> dict[str, dict[str, object]]:
    """Verdicts by what they were taken for, the latest last."""
    try:
        found = json.loads(_verdict_file().read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _verdict_file() -> Path:
    return paths.cache_dir() / "accelerators.json"


def _circumstances(image: Image) -> str:
    """A digest of everything that the verdict depends on."""
    qemu = bubblewrap.find("qemu-system-x86_64", INSTALL)
    found = qemu.stat()
    cpu = next(
        (line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ""
    )
    facts = [platform.release(), cpu, str(qemu), found.st_size, found.st_mtime_ns, image.digest]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
