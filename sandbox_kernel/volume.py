"""A volume in a guest, as a person writes it: `NAME:TARGET[:ro|:rw]`.

    models:/models         read-only, as with mounts; any number of kernels at a time
    results:/results:rw    read-write; one kernel at a time, and nobody else

What a volume is on the host, files/volumes.py says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sandbox_kernel import mount
from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.mount import Mount

NAME = r"[a-z0-9][a-z0-9_.-]{0,63}"
"""What a volume's name looks like."""
PATTERN = rf"{NAME}:/[^:\0]*(:(ro|rw))?"
"""What the attachment of a volume looks like; see `parse` for what it must be."""
MOST = 8
"""Volumes of one kernel."""


@dataclass(frozen=True)
class Volume:
    """One volume of one guest.

    Attributes:
        name: which.
        target: path in the guest, absolute and without `..`.
        writable: whether the guest may write to it.
    """

    name: str
    target: PurePosixPath
    writable: bool = False

    def __str__(self) -> str:
        """The text that this is parsed from."""
        return f"{self.name}:{self.target}:{'rw' if self.writable else 'ro'}"


def parse(text: str) -> Volume:
    """The volume that `text` describes.

    Raises:
        ConfigurationError: it is none, or lies where none can.
    """
    if not re.fullmatch(PATTERN, text):
        raise ConfigurationError(
            f"{text[:200]!r} is no volume; write NAME:TARGET or NAME:TARGET:rw, with a name of up to 64 "
            "lower-case letters, digits, `_`, `.` and `-`, and an absolute path."
        )
    name, target, *access = text.split(":")
    return Volume(name, mount.guest_place(target, f"The volume {name}"), access == ["rw"])


def check(volumes: Sequence[Volume], mounts: Sequence[Mount]) -> None:
    """Whether these can be together in one guest.

    Raises:
        ConfigurationError: they cannot.
    """
    for volume in volumes:
        if [each.name for each in volumes].count(volume.name) > 1:
            raise ConfigurationError(
                f"The volume {volume.name} is to be attached twice to one kernel; choose one path for it."
            )
        if [each.target for each in volumes].count(volume.target) > 1:
            raise ConfigurationError(
                f"Two volumes are to be mounted on {volume.target}; give each a path of its own."
            )
        for each in mounts:
            # Volumes are mounted first, so a mount would lie over them.
            if volume.target.is_relative_to(each.target):
                raise ConfigurationError(
                    f"The volume {volume.name} is to be mounted on {volume.target}, over which "
                    f"{each.source} is mounted on {each.target}; choose another path for one of them."
                )
