"""A tree of files as a stream: how it is written down, sent from a directory, received into one.

Both ends of a copy are this file, on the host and, copied there as `agent_tree.py`, in the guest; it imports
nothing but the standard library. A stream is records, big-endian, some with something behind them:

    kind 1 byte, length of the name 1, mode 2, mtime 8 (signed, ns since the epoch), size 8; the name

    D  a directory, of which all that follows is a part up to its U
    F  a file of about `size` bytes, whose content follows in pieces: length 4, bytes. Each piece has PIECE
       bytes but the last, which has fewer, perhaps none; a length of BROKEN and more ends a file that cannot
       be read to its end, for the reason `length - BROKEN`
    S  something that is left out, for the reason in `mode`; without a name the directory that it stands in,
       of which the rest cannot be read
    U  the end of a directory
    E  the end, after the one D…U or F that a stream has; that one has no name, as its receiver has chosen it

Rules, which hold whoever the peer is, and whatever others do to the files meanwhile:

1. Every path is walked from an open directory, name by name, and no link is followed on either side.
2. Only directories and regular files are sent, only permission bits kept, less what the umask takes.
3. A file is written without a name, or under another one where the file system knows no nameless ones, and
   gets its name when it is complete. It replaces a regular file and nothing else.
4. A peer decides on names below the top, and on nothing else; each is checked. What it sends is bounded by
   `Limits`, its depth by MAX_DEPTH, the time for each piece and record by the `Wire`.
5. What cannot be read or written is left out and named (`Tally`); the rest goes on, unless there is no room.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable

PIECE = 256 * 1024
"""Bytes of a file that travel, and are waited for, together."""
BROKEN = 0xFFFF0000
MAX_DEPTH = 100
"""Directories in each other."""
MAX_PROBLEMS = 50
"""Of what was left out, so many are named."""
LINK, SPECIAL, DEEP, TAKEN = 1000, 1001, 1002, 1003
"""Reasons beside errno's: it is a link, neither file nor directory, in more directories than MAX_DEPTH; where
it should go there is something that is neither."""

HEAD = struct.Struct(">cBHqQ")
LENGTH = struct.Struct(">I")
DIRECTORY, FILE, LEFT_OUT, UP, END = b"D", b"F", b"S", b"U", b"E"

_OPEN = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_OPEN_DIRECTORY = os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_NAMELESS = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""What a file system or Linux that knows no nameless files says."""
_MODE = 0o777
_LONGEST_PLACE = 1000


class WireError(Exception):
    """The peer hung up, or nothing goes or comes any more."""


class Spoken(Exception):
    """The peer has something to say before it was its turn."""


class FormatError(Exception):
    """What the peer sends is no tree."""


class Overflow(Exception):
    """There is more than the limits allow; `args[0]` is "size" or "entries"."""


class NoRoom(Exception):
    """The receiving file system is full; `args[0]` is errno's sentence."""


class Limits:
    """What a receiver takes: bytes of files; and files, directories and what is left out, together."""

    def __init__(self, size: int = 2**63 - 1, entries: int = 2**63 - 1) -> None:
        self.size, self.entries = size, entries


class Tally:
    """What has been copied so far, and what was left out.

    Attributes:
        files, directories: how many of each.
        size: bytes of files.
        expected: bytes that the only file has, as far as its sender knew; 0 for a directory.
        place: path, within the tree, of what is being copied.
        problems: place and reason of the first MAX_PROBLEMS that were left out.
        unlisted: how many more there are.
        failed: how many of all of them should have been copied, unlike links and special files.
    """

    def __init__(self) -> None:
        self.files = self.directories = self.size = self.expected = self.unlisted = self.failed = 0
        self.place = ""
        self.problems: list[tuple[str, int]] = []

    def leave_out(self, place: str, reason: int) -> None:
        """Notes that `place` is not copied."""
        self.failed += reason not in (LINK, SPECIAL)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((place[-_LONGEST_PLACE:], reason))
        else:
            self.unlisted += 1


Watch = Callable[[Tally], None]
"""Called now and then with how far a copy is; what it raises ends the copy."""


def reason_of(number: int) -> str:
    """Why something was left out, in words."""
    if number == LINK:
        return "is a link, which is not followed"
    if number == SPECIAL:
        return "is neither a file nor a directory"
    if number == DEEP:
        return f"lies in more than {MAX_DEPTH} directories"
    if number == TAKEN:
        return "has the name of a link, or of another thing that is no file, where it should go"
    return os.strerror(number)


class Wire:
    """One end of the stream: what goes out is gathered, what comes in is read ahead."""

    def __init__(self, connection: socket.socket, seconds: float, heed: bool = False) -> None:
        """The end over `connection`, which stays the caller's.

        Args:
            connection: a connected stream socket.
            seconds: that a record or piece may take.
            heed: whether what comes from the peer while something is sent raises `Spoken`.
        """
        connection.settimeout(seconds)
        self._connection, self._seconds, self._heed = connection, seconds, heed
        self._outgoing, self._incoming = bytearray(), bytearray()

    def put(self, data: bytes | memoryview) -> None:
        """Sends `data`, perhaps later.

        Raises:
            WireError: the peer does not take it.
            Spoken: it says something.
        """
        self._outgoing += data
        if len(self._outgoing) >= PIECE:
            self.flush()

    def flush(self) -> None:
        """Sends what was gathered; raises as `put`."""
        if self._heed and _readable(self._connection):
            raise Spoken
        try:
            self._connection.sendall(self._outgoing)
        except OSError as error:
            raise WireError(str(error)) from error
        self._outgoing.clear()

    def take(self, count: int) -> bytes:
        """The next `count` bytes.

        Raises:
            WireError: they do not come.
        """
        data = self._incoming
        if len(data) < count:
            self._complete(count)
        taken = bytes(data[:count])
        del data[:count]
        return taken

    def drain(self) -> None:
        """Throws away what comes, until the peer hangs up or is silent for too long."""
        try:
            while self._connection.recv(PIECE):
                pass
        except OSError:
            pass

    def _complete(self, count: int) -> None:
        deadline = time.monotonic() + self._seconds
        while len(self._incoming) < count:
            try:
                data = self._connection.recv(PIECE)
            except OSError as error:
                raise WireError(str(error)) from error
            if not data:
                raise WireError("it hung up")
            self._incoming += data
            if time.monotonic() > deadline and len(self._incoming) < count:
                raise WireError("timed out")


def _readable(connection: socket.socket) -> bool:
    """Whether something has come over `connection`, its end included."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


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
            HEAD.pack(kind, len(name), found.st_mode & _MODE, found.st_mtime_ns, found.st_size) + name
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


class Place:
    """Where a tree goes.

    Attributes:
        fd: an open directory, the place's own.
        name: what the tree is called in it; nothing: what the tree has in it goes right there.
        folder: whether only a directory may go there.
    """

    def __init__(self, fd: int, name: bytes, folder: bool = False) -> None:
        self.fd, self.name, self.folder = fd, name, folder

    @classmethod
    def at(cls, path: str, name: str, open_directory: Callable[[str], int]) -> Place:
        """The place that a user means by `path`.

        In a directory that exists, the tree gets the name that it has; otherwise it gets the last name of
        `path`, in a directory that exists.

        Args:
            path: as written.
            name: the tree's own; nothing for what is in it.
            open_directory: opens one by its path, or raises FileNotFoundError or NotADirectoryError.

        Raises:
            OSError: there is no directory for it.
        """
        if not path:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        trimmed = path.rstrip("/") or "/"
        above, last = os.path.split(trimmed)
        try:
            return cls(open_directory(trimmed), os.fsencode(name), not name)
        except (FileNotFoundError, NotADirectoryError):
            if last in ("", ".", ".."):
                raise
        # It is on the way to the place, not the place: whether a link may stand there, the caller decides.
        return cls(open_directory(f"{above or '.'}/."), os.fsencode(last), path.endswith("/"))

    def close(self) -> None:
        """Lets go of the directory."""
        os.close(self.fd)


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
                    os.mkdir(name, mode & _MODE | stat.S_IRWXU, dir_fd=above)
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
                _set_time(level.fd, level.mtime)
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

    def _begin(self, above: int, name: bytes, mode: int) -> _NewFile | None:
        try:
            return _NewFile(above, name, mode & _MODE)
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


class _NewFile:
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
        _set_time(self._fd, mtime)
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


def _set_time(fd: int, mtime: int) -> None:
    """Sets when a file was changed, as far as its file system can tell."""
    try:
        os.utime(fd, ns=(mtime, mtime))
    except (OSError, OverflowError):
        pass
