"""Files of the kernel's user, read and written for the host with that user's rights.

What stands at a path is user code's to decide, at any moment. So: the path is walked as that user, a link in
the last place is refused, opening never blocks (a FIFO, a lease), and only a regular file of an ordinary file
system is touched: `/proc/self` is the agent here, and its `mem` looks regular, too.
"""

from __future__ import annotations

import os
import stat

import system
from settings import Settings

_NOT_FILES = ("/proc", "/sys", "/sys/fs/cgroup")
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


def read(settings: Settings, path: str, offset: int, length: int) -> tuple[bytes, int]:
    """Up to `length` bytes from `offset`, and the file's size.

    Raises:
        OSError: that user may not, or there is no such file.
        ValueError: it is not a regular file.
    """
    fd = _open(settings, path, os.O_RDONLY, 0)
    try:
        return os.pread(fd, length, offset), os.fstat(fd).st_size
    finally:
        os.close(fd)


def write(settings: Settings, path: str, content: bytes, offset: int, mode: int) -> int:
    """Writes `content` at `offset`, cuts the file first when that is 0; returns its size then.

    Raises:
        OSError: that user may not, or there is no space left.
        ValueError: it is not a regular file.
    """
    fd = _open(settings, path, os.O_WRONLY | os.O_CREAT, mode)
    try:
        if offset == 0:
            os.ftruncate(fd, 0)
        rest = memoryview(content)
        while rest:
            written = os.pwrite(fd, rest, offset)
            rest, offset = rest[written:], offset + written
        return os.fstat(fd).st_size
    finally:
        os.close(fd)


def _open(settings: Settings, path: str, flags: int, mode: int) -> int:
    path = os.path.join(settings.home, path)
    other = os.geteuid() != settings.uid
    if other:
        system.act_as(settings.uid, settings.gid)
    try:
        fd = os.open(path, flags | _FLAGS, mode)
    finally:
        if other:
            system.act_as(os.geteuid(), os.getegid())
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_dev in _special():
        os.close(fd)
        raise ValueError(f"{path} is not a regular file")
    return fd


def _special() -> set[int]:
    """Devices of the file systems whose files are not files."""
    return {os.stat(folder).st_dev for folder in _NOT_FILES if os.path.exists(folder)}
