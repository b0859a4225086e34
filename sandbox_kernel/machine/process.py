"""QEMU as a child process: jailed, in its cgroup before its first instruction, watched by a pidfd.

bubblewrap is asked to hold the jailed process back (`--block-fd`) until the supervisor has put it into the
cgroup. Death is what the kernel reports through the pidfd, not what a signal handler may miss; and it is
mutual: bubblewrap and QEMU carry PR_SET_PDEATHSIG, so they go when the supervisor goes.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from sandbox_kernel.errors import HostError
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.spawn import Spawned, unsafe
from sandbox_kernel.machine.transcript import Transcript

_JAIL_DEADLINE = 10.0
_KILL_DEADLINE = 2.0


class QemuProcess:
    """A running, jailed QEMU."""

    def __init__(self, spawned: Spawned, stderr: Transcript) -> None:
        self._popen = spawned.popen
        self._lender = spawned.lender
        self._stderr = stderr
        self._child: int | None = None
        self._qemu_pid = 0
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._popen.pid)
        self.exited: asyncio.Future[int] = self._loop.create_future()
        """Exit status of the process, negative for a signal."""
        self._loop.add_reader(self._pidfd, self._on_exit)
        if self._lender is not None:
            self._lender.serve(self._loop)

    @classmethod
    async def start(cls, spawned: Spawned, cgroup: Cgroup, log: Path, nice: int = 0) -> QemuProcess:
        """Lets the program run, in its cgroup.

        Args:
            spawned: the jail that waits.
            cgroup: joined before the program runs.
            log: file for its standard error.
            nice: added to its niceness.

        Raises:
            HostError: the jail could not be set up.
            TemplateUnsafeError: likewise, and a RAM was to be lent; without it may be possible.
        """
        process = cls(spawned, Transcript(spawned.errors, log))
        try:
            async with asyncio.timeout(_JAIL_DEADLINE):
                child = await _read_child_pid(spawned.info)
            process._child = os.pidfd_open(child)
            process._qemu_pid = child
            cgroup.add(process.pid)
            cgroup.add(child)
            if nice:
                os.setpriority(os.PRIO_PROCESS, child, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        except (OSError, ValueError, KeyError, TimeoutError) as error:
            await process.kill()
            process.check_ram()
            raise HostError(
                f"bubblewrap could not set up QEMU's jail ({process.last_words() or error}); "
                "run `sandbox-kernel doctor` and look at user namespaces and cgroups."
            ) from error
        except BaseException:
            await process.kill()
            raise
        finally:
            os.close(spawned.info)
            with suppress(BrokenPipeError):
                os.write(spawned.block, b"\n")
            os.close(spawned.block)
        return process

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

    @property
    def qemu_pid(self) -> int:
        """Process id of QEMU itself, which stands for the guest's memory."""
        return self._qemu_pid

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
        if self._lender is not None:
            self._lender.close()
        self._stderr.close()
        self.exited.set_result(self._popen.wait())


async def _read_child_pid(fd: int) -> int:
    """The PID that bubblewrap reports on `--info-fd`."""
    loop = asyncio.get_running_loop()
    text = b""
    while b"}" not in text:
        ready = loop.create_future()
        loop.add_reader(fd, ready.set_result, None)
        try:
            await ready
        finally:
            loop.remove_reader(fd)
        data = os.read(fd, 4096)
        if not data:
            raise ValueError("it ended before it began")
        text += data
    return int(json.loads(text)["child-pid"])
