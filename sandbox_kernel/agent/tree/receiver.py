"""A tree is received: each name is checked, each file complete before it is there under its name."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from .form import (
    BROKEN,
    DIRECTORY,
    END,
    FILE,
    HEAD,
    LEFT_OUT,
    LENGTH,
    MAX_DEPTH,
    MODE,
    PIECE,
    TAKEN,
    UP,
    FormatError,
    Limits,
    NoRoom,
    Overflow,
    Tally,
    Watch,
)
from .new_file import NewFile, set_time
from .place import Place
from .wire import Wire

_OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class _Level:
    """A directory that is being received; `fd` is -1 when nothing of it is."""

    def __init__(self, fd: int, name: str, made: bool, mode: int, mtime: int) -> None:
        self.fd, self.name, self.made, self.mode, self.mtime = fd, name, made, mode, mtime


class Receiver:
    """Makes the tree that a stream tells of."""

    def __init__(self, wire: Wire, limits: Limits, watch: Watch | None = None) -> None:
        self._wire, self._limits, self._watch = wire, limits, watch
        self._levels: list[_Level] = []
        self._entries = self._size = 0
        self.tally = Tally()

    def receive(self, place: Place) -> None:
        """Receives one tree into `place`, which stays the caller's.

        Raises:
            WireError: the peer hung up or does not go on; what is complete stays.
            FormatError: it sent something else.
            Overflow: it sent too much.
            NoRoom: there is no space for it.
        """
        try:
            self._top(place)
            while self._levels:
                self._next()
        finally:
            for level in self._levels:
                if level.fd >= 0:
                    os.close(level.fd)
        if self._head()[0] != END:
            raise FormatError("it goes on after its end")

    def _top(self, place: Place) -> None:
        kind, name, mode, mtime, size = self._head()
        if name or kind not in (DIRECTORY, FILE):
            raise FormatError("it begins with neither a file nor a directory")
        self.tally.place = os.fsdecode(place.name)
        if kind == FILE:
            self.tally.expected = size
            self._file(-1 if place.folder else place.fd, place.name, mode, mtime, errno.ENOTDIR)
        elif place.name:
            self._enter(place.fd, place.name, mode, mtime)
        else:
            self._levels.append(_Level(os.dup(place.fd), "", False, mode, mtime))

    def _next(self) -> None:
        kind, name, mode, mtime, _ = self._head()
        level = self._levels[-1]
        if kind == UP and not name:
            self._leave()
            return
        if kind == LEFT_OUT and not name:
            self.tally.leave_out(self._place(b""), mode)
            return
        if not name or b"/" in name or b"\0" in name or name in (b".", b".."):
            raise FormatError(f"it has a file named {name!r}")
        if kind == LEFT_OUT:
            self.tally.leave_out(self._place(name), mode)
            return
        self.tally.place = self._place(name)
        if kind == DIRECTORY:
            self._enter(level.fd, name, mode, mtime)
        elif kind == FILE:
            self._file(level.fd, name, mode, mtime)
        else:
            raise FormatError(f"it has a record of the unknown kind {kind!r}")

    def _head(self) -> tuple[bytes, bytes, int, int, int]:
        kind, length, mode, mtime, size = HEAD.unpack(self._wire.take(HEAD.size))
        if kind in (DIRECTORY, FILE, LEFT_OUT):
            self._entries += 1
            if self._entries > self._limits.entries:
                raise Overflow("entries")
        return kind, self._wire.take(length), mode, mtime, size

    def _place(self, name: bytes) -> str:
        names = [level.name for level in self._levels if level.name]
        return "/".join([*names, os.fsdecode(name)] if name else names)

    def _enter(self, above: int, name: bytes, mode: int, mtime: int) -> None:
        if len(self._levels) == MAX_DEPTH:
            raise FormatError(f"it has more than {MAX_DEPTH} directories in each other")
        fd, made = -1, False
        if above >= 0:
            try:
                try:
                    os.mkdir(name, mode & MODE | stat.S_IRWXU, dir_fd=above)
                    made = True
                except FileExistsError:
                    pass
                fd = os.open(name, _OPEN_DIRECTORY, dir_fd=above)
            except OSError as error:
                self._failed(above, name, error)
        self._levels.append(_Level(fd, os.fsdecode(name), made, mode, mtime))

    def _leave(self) -> None:
        level = self._levels.pop()
        if level.fd < 0:
            return
        self.tally.directories += 1
        try:
            if level.made:
                mode = stat.S_IMODE(os.fstat(level.fd).st_mode) & ~stat.S_IRWXU
                os.fchmod(level.fd, mode | level.mode & stat.S_IRWXU)
                set_time(level.fd, level.mtime)
        except OSError:
            pass  # somebody else's; its files are there
        finally:
            os.close(level.fd)

    def _file(self, above: int, name: bytes, mode: int, mtime: int, refused: int = 0) -> None:
        """Receives a file; `refused`: the reason why one is not taken at all, when `above` is -1."""
        new, before, done = None, self.tally.size, False
        try:
            if above >= 0:
                new = self._begin(above, name, mode)
            elif refused:
                self.tally.leave_out(self.tally.place, refused)
            while True:
                [length] = LENGTH.unpack(self._wire.take(LENGTH.size))
                if length >= BROKEN:
                    self.tally.leave_out(self.tally.place, length - BROKEN)
                    return
                if length > PIECE:
                    raise FormatError(f"it has a piece of {length} bytes")
                self._size += length
                if self._size > self._limits.size:
                    raise Overflow("size")
                data = self._wire.take(length)
                self.tally.size += length
                if new is not None and not self._do(above, name, new.write, data):
                    new.close()
                    new = None
                if self._watch is not None:
                    self._watch(self.tally)
                if length < PIECE:
                    break
            done = new is not None and self._do(above, name, new.finish, mtime)
        finally:
            if done:
                self.tally.files += 1
            else:
                self.tally.size = before
            if new is not None:
                new.close()

    def _begin(self, above: int, name: bytes, mode: int) -> NewFile | None:
        try:
            return NewFile(above, name, mode & MODE)
        except OSError as error:
            self._failed(above, name, error)
            return None

    def _do(self, above: int, name: bytes, step: Callable[..., None], value: object) -> bool:
        try:
            step(value)
        except OSError as error:
            self._failed(above, name, error)
            return False
        return True

    def _failed(self, above: int, name: bytes, error: OSError) -> None:
        """Notes what came of an attempt to write.

        Raises:
            NoRoom: there will be no better luck with the next file.
        """
        if error.errno in _NO_ROOM:
            raise NoRoom(os.strerror(error.errno)) from error
        reason = error.errno or errno.EIO
        if reason in (errno.ENOTDIR, errno.EEXIST, errno.ELOOP):
            try:
                found = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
            except OSError:
                found = 0
            if stat.S_ISDIR(found):
                reason = errno.EISDIR
            elif not stat.S_ISREG(found):
                reason = TAKEN
        self.tally.leave_out(self.tally.place, reason)
