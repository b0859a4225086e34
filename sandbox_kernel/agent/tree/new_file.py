"""A file that is there under its name when it is complete, and not before."""

from __future__ import annotations

import errno
import os
import stat

_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""What a file system or Linux that knows no nameless files says."""


class NewFile:
    """A file that has no name yet; or, where the file system knows none of that kind, another name."""

    def __init__(self, above: int, name: bytes, mode: int) -> None:
        """A new file for `name` in the open directory `above`.

        Raises:
            OSError: it cannot be made.
        """
        self._above, self._name = above, name
        self._other = b""
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            self._fd = os.open(".", flags | os.O_TMPFILE, mode, dir_fd=above)
        except OSError as error:
            if error.errno not in _NO_NAMELESS:
                raise
            other = _other_name()
            self._fd = os.open(other, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=above)
            self._other = other

    def write(self, data: bytes) -> None:
        """Appends.

        Raises:
            OSError: it cannot be written.
        """
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def finish(self, mtime: int) -> None:
        """Gives it its name.

        Raises:
            OSError: it cannot be given; FileExistsError where that is something else's than a file's.
        """
        set_time(self._fd, mtime)
        nameless = f"/proc/self/fd/{self._fd}"
        if not self._other:
            try:
                os.link(nameless, self._name, dst_dir_fd=self._above)
                return
            except FileExistsError:
                pass
        try:
            found = os.stat(self._name, dir_fd=self._above, follow_symlinks=False)
            if not stat.S_ISREG(found.st_mode):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        except FileNotFoundError:
            pass
        if not self._other:
            other = _other_name()
            os.link(nameless, other, dst_dir_fd=self._above)
            self._other = other
        # What has come to stand there since is replaced, never followed.
        os.rename(self._other, self._name, src_dir_fd=self._above, dst_dir_fd=self._above)
        self._other = b""

    def close(self) -> None:
        """Lets go of it; without a name of its own by then it is gone. Idempotent."""
        if self._other:
            try:
                os.unlink(self._other, dir_fd=self._above)
            except OSError:
                pass
            self._other = b""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _other_name() -> bytes:
    return b".%s.copy" % os.urandom(8).hex().encode()


def set_time(fd: int, mtime: int) -> None:
    """Sets when a file was changed, as far as its file system can tell."""
    try:
        os.utime(fd, ns=(mtime, mtime))
    except (OSError, OverflowError):
        pass
