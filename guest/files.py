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
    fd = open_as_user(settings, path, flags, mode)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_dev in not_files():
        os.close(fd)
        raise ValueError(f"{os.path.join(settings.home, path)} is not a regular file")
    return fd


def open_as_user(settings: Settings, path: str, flags: int, mode: int = 0) -> int:
    """Opens whatever stands at `path`, without waiting; what it is, the caller has to look at.

    Raises:
        OSError: the user may not, there is nothing, or a link.
    """
    with AsUser(settings):
        return os.open(os.path.join(settings.home, path), flags | _FLAGS, mode)


class AsUser:
    """While it is entered, this thread's accesses to files are checked as those of the kernel's user."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._other = os.geteuid() != settings.uid

    def __enter__(self) -> None:
        if self._other:
            system.act_as(self._settings.uid, self._settings.gid)

    def __exit__(self, *error: object) -> None:
        if self._other:
            system.act_as(os.geteuid(), os.getegid())


def not_files() -> frozenset[int]:
    """Devices of the file systems whose files are not files."""
    return frozenset(os.stat(folder).st_dev for folder in _NOT_FILES if os.path.exists(folder))
