"""QEMU as a child process that runs: watched by a pidfd, ended for certain.

Death is what the kernel reports through the pidfd, not what a signal handler may miss; and it is mutual:
bubblewrap and QEMU carry PR_SET_PDEATHSIG, so they go when the supervisor goes.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from pathlib import Path

from sandbox_kernel.machine.spawn import Spawned, unsafe
from sandbox_kernel.machine.transcript import Transcript

_KILL_DEADLINE = 2.0


class QemuProcess:
    """A running, jailed QEMU."""

    def __init__(self, spawned: Spawned, log: Path) -> None:
        """Takes over a process, with `log` as the file for its standard error; needs a running event loop."""
        self._popen = spawned.popen
        self._parent, self._lender = spawned.parent, spawned.lender
        self._stderr = Transcript(spawned.errors, log)
        self._child: int | None = None
        self.qemu_pid = spawned.child
        """Process id of QEMU itself, which stands for the guest's memory."""
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._popen.pid)
        self.exited: asyncio.Future[int] = self._loop.create_future()
        """Exit status of the process, negative for a signal."""
        self._loop.add_reader(self._pidfd, self._on_exit)
        with suppress(ProcessLookupError):
            self._child = os.pidfd_open(spawned.child)
        if self._lender is not None:
            self._lender.serve(self._loop)

    def check_ram(self) -> None:
        """For a QEMU that has not started: was it for want of its RAM?

        Raises:
            TemplateUnsafeError: it was not lent its RAM, and could not open it otherwise.
        """
        if self._lender is not None and not self._lender.lent:
            reason = self._lender.refusal or self.last_words() or "QEMU did not ask for it"
            raise unsafe(reason)

    @property
    def pid(self) -> int:
        """Process id of bubblewrap, which is QEMU's parent and ends with it."""
        return self._popen.pid

    def last_words(self) -> str:
        """The last lines that QEMU or bubblewrap wrote to standard error."""
        return self._stderr.last_lines(3)

    async def kill(self) -> int:
        """Ends the process at once and returns its exit status; idempotent.

        QEMU is killed first, so that bubblewrap, its parent, collects it and no zombie is left to an init
        that may not care.
        """
        for pidfd in (self._child, self._pidfd):
            if pidfd is not None and not self.exited.done():
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await asyncio.wait({self.exited}, timeout=_KILL_DEADLINE)
        return await asyncio.shield(self.exited)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        for pidfd in (self._pidfd, self._child):
            if pidfd is not None:
                os.close(pidfd)
        self._parent.close()
        self._stderr.close()
        self.exited.set_result(self._popen.wait())
