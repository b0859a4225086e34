"""Lends a program a descriptor for reading where it opens a file for writing that it only reads.

QEMU before 8.2 opens the file of its RAM with `O_RDWR`, also where it maps it privately. In the jail a
template's RAM is mounted read-only, so that fails. The lender is asked about the call (`seccomp.py`) and
answers it with a descriptor for reading. The mount is what protects the file: a call that the lender lets go
on ends there. So does whoever opens the lent descriptor anew through `/proc/self/fd`: a descriptor stays on
its mount, and the lender opens the file from the jail's root. It gives nothing that the program cannot get.

It lends once, before the guest has run an instruction, and then closes the listener. From then on nobody can
make the supervisor work or wait by opening files; calls of this kind fail with ENOSYS.

The filter is put on the thread that starts the program (parent.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar

from sandbox_kernel.jail.parent import ParentThread
from sandbox_kernel.jail.seccomp import Filter, Listener, Request

if TYPE_CHECKING:
    import asyncio

_T = TypeVar("_T")


class Lender:
    """One file for one child."""

    def __init__(self, path: PurePosixPath) -> None:
        """`path` is what the child calls the file, from its own root."""
        self._path = path
        self._listener: Listener | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._parent = ParentThread()
        self.lent = False
        """Whether the child has the file."""
        self.refusal = ""
        """Why the child could not be had to ask, or be lent the file when it did."""

    def run(self, start: Callable[[], _T]) -> _T:
        """Calls `start` in a thread whose children ask for the file; `serve` answers, `close` ends it.

        Args:
            start: starts the child, and must itself not open a file with `O_RDWR` alone: nobody serves yet.

        Raises:
            OSError: Linux refused the filter (`refusal` says why), or it is from `start`.
        """

        def begin() -> _T:
            self._listener = Listener(self._install())
            return start()

        try:
            return self._parent.run(begin)
        except BaseException:
            self.close()
            raise

    def turn(self) -> None:
        """Answers what has been asked so far, for a caller that has no event loop yet."""
        if self._listener is not None:
            self._on_request()

    def serve(self, loop: asyncio.AbstractEventLoop) -> None:
        """Answers from now on, one call a turn of the loop; what has been asked so far has waited."""
        if self._listener is not None:
            self._loop = loop
            loop.add_reader(self._listener.fileno(), self._on_request)

    def close(self) -> None:
        """Ends it, when the child has ended; idempotent."""
        self._stop_listening()
        self._parent.close()

    def _install(self) -> int:
        try:
            return Filter().install()
        except OSError as error:
            self.refusal = f"seccomp: {error.strerror}"
            raise

    def _stop_listening(self) -> None:
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
            except FileNotFoundError:
                return  # a signal came between, and the call begins anew; or its end is the next that comes
            except OSError as error:
                self.refusal = f"seccomp: {error.strerror}"
                self._listener.let_go_on(request)
        except (OSError, EOFError) as error:
            self.refusal = str(error)
        self._stop_listening()

    def _lend(self, listener: Listener, request: Request) -> None:
        root = Path(f"/proc/{request.thread}/root")
        # An absolute link would lead from that root to ours.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(root / self._path.relative_to("/"), flags)
        try:
            listener.answer(request, fd)
        finally:
            os.close(fd)
