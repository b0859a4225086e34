"""A VM's scratch disk: a file without a name, with an empty file system in it.

It has no name from the beginning (O_TMPFILE, open(2)), so whatever happens to whom, its space is free again
when QEMU is gone. It takes room as it fills; its size is what the guest can have of it at most.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import HostError, NoSpaceError
from sandbox_kernel.files import ext4

_SECONDS = 30.0


def make(size: int) -> int:
    """A new scratch disk.

    Args:
        size: MiB.

    Returns:
        Its descriptor, the caller's.

    Raises:
        MissingToolError: e2fsprogs is not installed.
        NoSpaceError: there is no room for an empty one.
        HostError: the folder cannot hold such a file.
    """
    mke2fs = ext4.find("leave `disk` out")
    folder = paths.cache_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(_no_room(folder, str(error.strerror))) from error
        raise HostError(
            f"A scratch disk cannot be made in {folder} ({error.strerror}); point XDG_CACHE_HOME at a file "
            "system that knows O_TMPFILE, or leave `disk` out."
        ) from error
    try:
        os.ftruncate(fd, size << 20)
        # No journal: nobody will ever see it after a crash.
        ext4.make(mke2fs, fd, journal=False, owner=0, seconds=_SECONDS)
    except HostError as error:
        os.close(fd)
        raise type(error)(_no_room(folder, str(error))) from error
    except BaseException:
        os.close(fd)
        raise
    return fd


def _no_room(folder: Path, reason: str) -> str:
    return f"A scratch disk cannot be made in {folder} ({reason}); make room there."
