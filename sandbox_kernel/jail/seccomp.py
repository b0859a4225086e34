"""Seccomp user notification: a process asks for a file, another one answers (seccomp_unotify(2)).

A filter in the one process holds back one kind of call: open(2), and openat(2) from the working directory,
with the flags `O_RDWR` and no other. Whoever has the filter's listener lets the call go on or answers it
with a descriptor of its own. Needs x86-64 and Linux 5.14 (`SECCOMP_ADDFD_FLAG_SEND`).

Nothing here keeps anybody from anything: a call that goes on may name another path by then than the one that
was looked at. What a process may open is for its mounts to say.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# linux/prctl.h, asm/unistd_64.h, linux/seccomp.h
_PR_SET_NO_NEW_PRIVS = 38
_SYS_SECCOMP = 317
_SET_MODE_FILTER = 1
_FILTER_FLAGS = 1 << 3 | 1 << 2
"""NEW_LISTENER; SPEC_ALLOW, as it is for QEMU's own filter to say what speculation costs."""
_RET_USER_NOTIF = 0x7FC00000
_RET_ALLOW = 0x7FFF0000
_IOCTL_RECV = 0xC0502100
_IOCTL_SEND = 0xC0182101
_IOCTL_ID_VALID = 0x40082102
_IOCTL_ADDFD = 0x40182103
_CONTINUE = 1 << 0
_ADDFD_SEND = 1 << 1

_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
"""`struct seccomp_notif`: id, thread, flags; the call's number, architecture, instruction and arguments."""
_RESPONSE = struct.Struct("=QqiI")
"""`struct seccomp_notif_resp`: id, value, error, flags."""
_ADDFD = struct.Struct("=QIIII")
"""`struct seccomp_notif_addfd`: id, flags, descriptor here, descriptor there, flags of that one."""

_OPEN = 2
_OPENAT = 257
_AUDIT_ARCH_X86_64 = 0xC000003E
_O_LARGEFILE = 0o100000
_AT_FDCWD = -100 & 0xFFFFFFFF

# linux/bpf_common.h: LD|W|ABS, JMP|JEQ|K, JMP|JA, ALU|AND|K, RET|K
_LOAD, _EQUAL, _JUMP, _AND, _RETURN = 0x20, 0x15, 0x05, 0x54, 0x06
# Where they stand in `struct seccomp_data`; of an argument the lower half, which comes first.
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, (16, 24, 32)

# Each line: operation, lines to skip if it holds, lines to skip if not, operand. Other calls are allowed by
# their number alone, which Linux (5.11) keeps in a table and does not run the filter for.
_PROGRAM = (
    (_LOAD, 0, 0, _ARCHITECTURE),
    (_EQUAL, 0, 11, _AUDIT_ARCH_X86_64),
    (_LOAD, 0, 0, _NUMBER),
    (_EQUAL, 5, 0, _OPEN),
    (_EQUAL, 0, 8, _OPENAT),
    (_LOAD, 0, 0, _ARGUMENTS[0]),
    (_EQUAL, 0, 6, _AT_FDCWD),
    (_LOAD, 0, 0, _ARGUMENTS[2]),
    (_JUMP, 0, 0, 1),
    (_LOAD, 0, 0, _ARGUMENTS[1]),
    (_AND, 0, 0, 0xFFFFFFFF & ~_O_LARGEFILE),
    (_EQUAL, 0, 1, os.O_RDWR),
    (_RETURN, 0, 0, _RET_USER_NOTIF),
    (_RETURN, 0, 0, _RET_ALLOW),
)


class Filter:
    """The filter and the calls that install it."""

    def __init__(self) -> None:
        lines = b"".join(struct.pack("=HBBI", *line) for line in _PROGRAM)
        self._lines = ctypes.create_string_buffer(lines, len(lines))
        # struct sock_fprog: number of lines, padding, address
        program = struct.pack("@HP", len(_PROGRAM), ctypes.addressof(self._lines))
        self._program = ctypes.create_string_buffer(program, len(program))
        libc = ctypes.CDLL(None, use_errno=True)
        self._prctl, self._syscall = libc.prctl, libc.syscall
        self._prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
        self._syscall.argtypes = [ctypes.c_long, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_void_p]
        self._syscall.restype = ctypes.c_long

    def install(self) -> int:
        """Puts the calling thread and its future children under the filter, for good, with `no_new_privs`.

        Returns:
            The listener, close-on-exec.

        Raises:
            OSError: Linux refused; EBUSY: this process is under somebody else's notifying filter.
        """
        if self._prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise _error()
        address = ctypes.addressof(self._program)
        listener = self._syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _FILTER_FLAGS, address)
        if listener < 0:
            raise _error()
        return int(listener)


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))


@dataclass(frozen=True)
class Request:
    """A call that waits for an answer.

    Attributes:
        id: the kernel's name for it.
        thread: who made it, as seen from here.
        path: address of the path in its memory.
    """

    id: int
    thread: int
    path: int


class Listener:
    """The end of a filter at which calls arrive and are answered; never waits for one."""

    def __init__(self, fd: int) -> None:
        """`fd` is from `Filter.install`, from now on closed by `close`."""
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    def fileno(self) -> int:
        """Readable when a call waits, or when nobody is under the filter any more."""
        return self._fd

    def close(self) -> None:
        """Lets go of the filter: calls that wait or are to come fail with ENOSYS."""
        os.close(self._fd)

    def receive(self) -> Request | None:
        """The next call that waits; None when there is none any more.

        Raises:
            EOFError: nobody is under the filter any more.
        """
        # Asked when there is nothing, the kernel would let us wait.
        events = self._poll.poll(0)
        if not events:
            return None
        if not events[0][1] & select.POLLIN:
            raise EOFError("nobody is under the filter any more")
        buffer = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(self._fd, _IOCTL_RECV, buffer)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):  # it was killed in between
                return None
            raise
        id_, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(buffer)
        return Request(id_, thread, arguments[0 if number == _OPEN else 1])

    def names(self, request: Request, path: bytes) -> bool:
        """Whether a call is for exactly `path`; False, too, for one whose memory cannot be read."""
        wanted = path + b"\0"
        try:
            with Path(f"/proc/{request.thread}/mem").open("rb", buffering=0) as memory:
                # The number may be another thread's by now; the memory is that of the call if it still waits.
                fcntl.ioctl(self._fd, _IOCTL_ID_VALID, struct.pack("=Q", request.id))
                return os.pread(memory.fileno(), len(wanted), request.path) == wanted
        except (OSError, OverflowError):
            return False

    def let_go_on(self, request: Request) -> None:
        """The call goes on as if there were no filter."""
        with suppress(FileNotFoundError):  # it was killed in between
            fcntl.ioctl(self._fd, _IOCTL_SEND, _RESPONSE.pack(request.id, 0, 0, _CONTINUE))

    def answer(self, request: Request, fd: int) -> None:
        """The call returns a copy of the descriptor `fd`.

        Raises:
            OSError: it cannot be given, and the call still waits (EINVAL: Linux is older than 5.14), or
                whoever asked is gone (ENOENT).
        """
        fcntl.ioctl(self._fd, _IOCTL_ADDFD, _ADDFD.pack(request.id, _ADDFD_SEND, fd, 0, os.O_CLOEXEC))
