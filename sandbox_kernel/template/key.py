"""What a template is for: everything that shaped it. A VM may only be restored by what saved it."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

FORMAT = 3
"""Version of how templates are made and kept; a change makes all of them stale."""


@dataclass(frozen=True)
class TemplateKey:
    """Everything that shaped a template.

    Attributes:
        image: digest of the guest image, which covers the guest's kernel and our programs in it.
        memory: RAM in MiB.
        vcpus: virtual CPUs.
        accelerator: `kvm` or `tcg`.
        modules: Python modules that its kernel has imported, sorted.
        network: whether it has a network device.
        qemu: which QEMU saved it: path, bytes, time of its last change in nanoseconds.
        cpu: the host's CPU and Linux for `kvm`, where the guest sees them; empty for `tcg`.
        machine: QEMU's options that shape the machine, in words.
    """

    image: str
    memory: int
    vcpus: int
    accelerator: str
    modules: tuple[str, ...]
    network: bool
    qemu: tuple[str, int, int]
    cpu: str
    machine: str
    format: int = FORMAT

    def digest(self) -> str:
        """The key as a name: 24 hexadecimal digits."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


def identify_qemu(program: Path) -> tuple[str, int, int]:
    """Which QEMU this is, without asking it: a package's update changes the file."""
    found = program.stat()
    return str(program), found.st_size, found.st_mtime_ns


def identify_cpu(accelerator: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What of this host a guest under `accelerator` can see."""
    if accelerator == "tcg":
        return ""
    seen = [
        line
        for line in cpuinfo.read_text().split("\n\n")[0].splitlines()
        if line.startswith(("model name", "stepping", "microcode", "flags"))
    ]
    digest = hashlib.sha256("\n".join(seen).encode()).hexdigest()[:16]
    return f"{digest} {platform.release()}"
