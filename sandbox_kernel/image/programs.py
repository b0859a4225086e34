"""Our own programs for the guest: which files they are and under what name they go into the image.

Everything of `guest/` that is Python; in a checkout `agent_protocol.py` and the files of `agent_tree/` are
links to the modules that host and guest share. They lie in `DIRECTORY` of the root. The initramfs' init
is a shell script and travels in the initramfs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from sandbox_kernel import resources
from sandbox_kernel.errors import ImageError

DIRECTORY = PurePosixPath("usr/lib/sandbox-kernel")
"""Where they lie, relative to the guest's root."""
INIT = "init.py"
"""What the initramfs runs as the guest's first process."""


@dataclass(frozen=True)
class Program:
    """One file: its path below `DIRECTORY` and its content."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Hash of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()


def collect(guest: Path | None = None) -> tuple[Program, ...]:
    """The programs in their order by name.

    Args:
        guest: folder of the guest's programs; the installed one when None.

    Raises:
        ImageError: `init.py` is not among them, so that no guest could start.
    """
    folder = guest or resources.guest_dir()
    found = [
        Program(file.relative_to(folder).as_posix(), file.read_bytes())
        for file in sorted(folder.rglob("*.py"))
    ]
    if not any(program.name == INIT for program in found):
        raise ImageError(f"{folder} lacks {INIT}, the guest's first program; reinstall sandbox-kernel.")
    return tuple(sorted(found, key=lambda program: program.name))


def initramfs_init(guest: Path | None = None) -> str:
    """Text of the script that the guest's kernel runs first.

    Raises:
        ImageError: it is missing.
    """
    file = (guest or resources.guest_dir()) / "initramfs" / "init"
    try:
        return file.read_text()
    except OSError as error:
        raise ImageError(f"{file} is missing; reinstall sandbox-kernel.") from error
