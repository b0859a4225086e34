"""Where figures were measured: processor, cores, system, QEMU, accelerator, versions that matter."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """The machine and what ran on it; an empty string is "there is none"."""

    processor: str
    cores: int
    system: str
    kernel: str
    python: str
    ipykernel: str
    qemu: str
    accelerator: str

    def line(self) -> str:
        """All of it on one line."""
        words = [
            f"{self.cores} × {self.processor}",
            self.system,
            f"Linux {self.kernel}",
            f"Python {self.python}",
            f"ipykernel {self.ipykernel}",
            f"QEMU {self.qemu}" if self.qemu else "no QEMU",
        ]
        return ", ".join(words + ([f"accelerator {self.accelerator}"] if self.accelerator else []))


def look(accelerator: str = "") -> Machine:
    """This machine, and the accelerator that a kernel reported."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return Machine(
        processor=model[1].strip() if model else platform.machine(),
        cores=os.cpu_count() or 1,
        system=platform.freedesktop_os_release().get("PRETTY_NAME", "Linux"),
        kernel=platform.release(),
        python=platform.python_version(),
        ipykernel=metadata.version("ipykernel"),
        qemu=_qemu(),
        accelerator=accelerator,
    )


def _qemu() -> str:
    binary = shutil.which("qemu-system-x86_64")
    if binary is None:
        return ""
    done = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=False)
    version = re.search(r"version (\S+)", done.stdout)
    return version[1] if version else ""
