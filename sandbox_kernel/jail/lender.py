"""Lends a program a descriptor for reading where it opens a file for writing that it only reads.

QEMU before 8.2 opens the file of its RAM with `O_RDWR`, also where it maps it privately. In the jail a
template's RAM is mounted read-only, so that fails. The lender is asked about the call (`seccomp.py`) and
answers it with a descriptor for reading. The mount is what protects the file: a call that the lender lets go
on ends there. So does whoever opens the lent descriptor anew through `/proc/self/fd`: a descriptor stays on
its mount, and the lender opens the file from the jail's root. It gives nothing that the program cannot get.

It lends once, before the guest has run an instruction, and then closes the listener. From then on nobody can
make the supervisor work or wait by opening files; calls of this kind fail with ENOSYS.

    before the fork      Lender(…)
    between fork and exec    enter, in the child
    after the fork       collect
    in the event loop    serve
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from sandbox_kernel.jail.seccomp import Filter, Listener, Request

if TYPE_CHECKING:
    import asyncio

_ERRNO = struct.Struct("=i")


class Lender:
    """One file for one child."""

    def __init__(self, path: PurePosixPath) -> None:
        """Prepares everything that the child needs; `path` is what it calls the file, from its own root."""
        self._path = path
        self._filter = Filter()
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._here, self._there = socket.socketpair()
        self.lent = False
        """Whether the child has the file."""
        self.refusal = ""
        """Why it could not be lent, when it was asked for."""

    def enter(self) -> None:
        """For the child, between fork and exec, while it has one thread: from now on it asks.

        Raises:
            OSError: Linux refused; `collect` tells the parent.
        """
        try:
            listener = self._filter.install()
        except OSError as error:
            self._there.send(_ERRNO.pack(error.errno or errno.EIO))
            raise
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", listener))]
        self._there.sendmsg([_ERRNO.pack(0)], rights)

    def collect(self) -> None:
        """For the parent, once the child has been through `enter`: takes the listener.

        Raises:
            OSError: Linux refused.
        """
        self._there.close()
        data, fds, _, _ = socket.recv_fds(self._here, _ERRNO.size, 1, socket.MSG_CMSG_CLOEXEC)
        self._here.close()
        if not fds:
            number = _ERRNO.unpack(data)[0] if len(data) == _ERRNO.size else errno.ECHILD
            raise OSError(number, os.strerror(number))
        self._listener = Listener(fds[0])

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers from now on, one call a turn of the loop; what has been asked so far has waited."""
        if self._listener is not None:
            self._loop = loop
            loop.add_reader(self._listener.fileno(), self._on_request)

    def close(self) -> None:
        """Ends it; idempotent."""
        self._here.close()
        self._there.close()
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    def _on_request(self) -> None:
        assert self._listener is not None
        try:
            request = self._listener.receive()
            if request is None:
                return
            if not self._listener.names(request, os.fsencode(self._path)):
                self._listener.let_go_on(request)
                return
            try:
                self._lend(self._listener, request)
                self.lent = True
            except OSError as error:
                self.refusal = f"seccomp: {error.strerror}"
                self._listener.let_go_on(request)
        except (OSError, EOFError) as error:
            self.refusal = str(error)
        self.close()

    def _lend(self, listener: Listener, request: Request) -> None:
        root = Path(f"/proc/{request.thread}/root")
        # An absolute link would lead from that root to ours.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(root / self._path.relative_to("/"), flags)
        try:
            listener.answer(request, fd)
        finally:
            os.close(fd)
