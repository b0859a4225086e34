"""A tree is sent: it is walked from an open directory, and no link is followed."""

from __future__ import annotations

import errno
import os
import stat

from .form import (
    BROKEN,
    DEEP,
    DIRECTORY,
    END,
    FILE,
    HEAD,
    LEFT_OUT,
    LENGTH,
    LINK,
    MAX_DEPTH,
    MODE,
    PIECE,
    SPECIAL,
    UP,
    Tally,
    Watch,
)
from .wire import Wire

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY


class Sender:
    """Writes a tree down."""

    def __init__(
        self, wire: Wire, watch: Watch | None = None, not_files: frozenset[int] = frozenset()
    ) -> None:
        """Sends over `wire`; nothing of file systems whose device is in `not_files`."""
        self._wire, self._watch, self._not_files = wire, watch, not_files
        self._buffer = memoryview(bytearray(PIECE))
        self.tally = Tally()

    def send(self, fd: int) -> None:
        """Sends the file or directory that `fd` is open on, which stays the caller's, and ends the stream.

        Raises:
            WireError, Spoken: as `Wire.put`.
            OSError: it cannot be looked at.
        """
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            self._directory(fd, b"", found, "", 1)
        else:
            self.tally.expected = found.st_size
            self._file(fd, b"", found)
        self._wire.put(HEAD.pack(END, 0, 0, 0, 0))
        self._wire.flush()

    def _directory(self, fd: int, name: bytes, found: os.stat_result, place: str, depth: int) -> None:
        self._record(DIRECTORY, name, found)
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._entry(fd, entry, place, depth)
        except OSError as error:
            self._leave_out(b"", error.errno or errno.EIO)
        self._wire.put(HEAD.pack(UP, 0, 0, 0, 0))

    def _entry(self, fd: int, entry: os.DirEntry[str], place: str, depth: int) -> None:
        name, place = os.fsencode(entry.name), f"{place}/{entry.name}" if place else entry.name
        self.tally.place = place
        try:
            folder = entry.is_dir(follow_symlinks=False)
            reason = self._why_not(entry, folder, depth)
            inner = -1 if reason else os.open(name, _OPEN, dir_fd=fd)
        except OSError as error:
            reason = LINK if error.errno == errno.ELOOP else error.errno or errno.EIO
        if reason:
            self._leave_out(name, reason)
            return
        try:
            found = os.fstat(inner)
            # It may have become another thing since it was looked at.
            kind = stat.S_ISDIR if folder else stat.S_ISREG
            if found.st_dev in self._not_files or not kind(found.st_mode):
                self._leave_out(name, SPECIAL)
            elif folder:
                self._directory(inner, name, found, place, depth + 1)
            else:
                self._file(inner, name, found)
        finally:
            os.close(inner)

    def _why_not(self, entry: os.DirEntry[str], folder: bool, depth: int) -> int:
        if folder:
            return DEEP if depth == MAX_DEPTH else 0
        if entry.is_symlink():
            return LINK
        return 0 if entry.is_file(follow_symlinks=False) else SPECIAL

    def _file(self, fd: int, name: bytes, found: os.stat_result) -> None:
        self._record(FILE, name, found)
        tally, buffer, count = self.tally, self._buffer, PIECE
        while count == PIECE:
            try:
                count = _fill(fd, buffer)
            except OSError as error:
                self._wire.put(LENGTH.pack(BROKEN + (error.errno or errno.EIO)))
                return
            self._wire.put(LENGTH.pack(count))
            self._wire.put(buffer[:count])
            tally.size += count
            if self._watch is not None:
                self._watch(tally)
        tally.files += 1

    def _record(self, kind: bytes, name: bytes, found: os.stat_result) -> None:
        self._wire.put(
            HEAD.pack(kind, len(name), found.st_mode & MODE, found.st_mtime_ns, found.st_size) + name
        )

    def _leave_out(self, name: bytes, reason: int) -> None:
        self._wire.put(HEAD.pack(LEFT_OUT, len(name), reason, 0, 0) + name)


def _fill(fd: int, buffer: memoryview) -> int:
    """Reads until `buffer` is full or the file has ended; the bytes read."""
    count = 0
    while count < len(buffer):
        got = os.readv(fd, [buffer[count:]])
        if not got:
            break
        count += got
    return count
