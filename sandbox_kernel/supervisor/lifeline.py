"""How a client watches and ends a supervisor's process: its own child, or somebody else's."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Protocol

LOST = 128 + signal.SIGKILL
"""Exit status, as a shell would show it, of a process that ended without a word."""


class Lifeline(Protocol):
    """A process that a client holds; statuses are as a shell shows them."""

    pid: int

    def poll(self, told: int | None) -> int | None:
        """The exit status; `told` where only the process itself could tell it; None while it runs."""

    def kill(self) -> None:
        """Ends it at once, if it has not ended."""

    def wait(self) -> None:
        """Blocks until it has ended."""

    def close(self) -> None:
        """Lets go of it; it has ended."""


class Child:
    """A supervisor that this process has started."""

    def __init__(self, control: socket.socket) -> None:
        """Starts it, with `control` as its end of the socket.

        It gets a session of its own (a Ctrl-C in the client's terminal is the client's business) and no
        folder of the client's on its module path.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "sandbox_kernel.supervisor", str(control.fileno())],
            pass_fds=(control.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def poll(self, told: int | None) -> int | None:
        """See `Lifeline`; a child's status comes from the kernel."""
        status = self._process.poll()
        return 128 - status if status is not None and status < 0 else status

    def kill(self) -> None:
        """See `Lifeline`."""
        if self._process.poll() is None:
            self._process.kill()

    def wait(self) -> None:
        """See `Lifeline`."""
        self._process.wait()

    def close(self) -> None:
        """See `Lifeline`."""


class Ward:
    """A supervisor that somebody else has started, held by a pidfd (pidfd_open(2))."""

    def __init__(self, pid: int, pidfd: int) -> None:
        """Takes over `pidfd`."""
        self.pid = pid
        self._pidfd = pidfd

    def fileno(self) -> int:
        """The pidfd, readable when the process has ended."""
        return self._pidfd

    def poll(self, told: int | None) -> int | None:
        """See `Lifeline`."""
        if self._pidfd >= 0 and not self._ended(0):
            return None
        return LOST if told is None else told

    def kill(self) -> None:
        """See `Lifeline`."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def wait(self) -> None:
        """See `Lifeline`."""
        if self._pidfd >= 0:
            self._ended(None)

    def close(self) -> None:
        """See `Lifeline`."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _ended(self, milliseconds: int | None) -> bool:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(milliseconds))
