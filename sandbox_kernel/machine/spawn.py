"""Starts QEMU's process: jailed, and in its cgroup before its first instruction. Needs no event loop.

It is born in the cgroup where that can be had. Where not, bubblewrap is asked to hold the jailed process back
(`--block-fd`) until it has been put there, which takes some milliseconds that are waited for here.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sandbox_kernel.errors import HostError, TemplateUnsafeError
from sandbox_kernel.jail.bubblewrap import Jail
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.jail.parent import ParentThread

if TYPE_CHECKING:
    from sandbox_kernel.jail.lender import Lender

_DEADLINE = 10.0
_KILLED = 1.0
_WORDS = 4096


@dataclass(frozen=True)
class Spawned:
    """A QEMU that runs; `QemuProcess` takes it from here.

    Attributes:
        popen: bubblewrap.
        child: process id of QEMU.
        errors: what both write to standard error.
        parent: the thread that has started it, to be closed when it has ended.
        lender: answers when QEMU opens its RAM, and is then that thread's owner; None where it needs nobody
            for that.
    """

    popen: subprocess.Popen[bytes]
    child: int
    errors: int
    parent: ParentThread | Lender
    lender: Lender | None

    def kill(self) -> None:
        """Ends a process that nobody has taken.

        QEMU first, so that bubblewrap, its parent, collects it and no zombie is left to an init that may not
        care.
        """
        with suppress(ProcessLookupError):
            os.kill(self.child, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(_KILLED)
        _end(self.popen, self.errors, self.parent)


def spawn(
    jail: Jail,
    argv: Sequence[str],
    fds: Sequence[int],
    cgroup: Cgroup,
    nice: int = 0,
    lender: Lender | None = None,
) -> Spawned:
    """Starts `argv` in `jail`.

    Args:
        jail: what it may see.
        argv: QEMU's command line.
        fds: descriptors it inherits under the same numbers.
        cgroup: joined before the program runs.
        nice: added to its niceness.
        lender: lends it its RAM; from now on closed by whoever ends the process.

    Raises:
        HostError: the jail could not be set up.
        TemplateUnsafeError: likewise, or the RAM cannot be lent on this host; without it may be possible.
    """
    info_reader, info_writer = os.pipe2(os.O_CLOEXEC)
    block_reader, block_writer = os.pipe2(os.O_CLOEXEC)
    error_reader, error_writer = os.pipe2(os.O_CLOEXEC)
    parent = lender or ParentThread()
    popen, born = None, False

    def start() -> subprocess.Popen[bytes]:
        nonlocal born
        born = cgroup.join()
        return subprocess.Popen(
            jail.command(argv, info_fd=info_writer, block_fd=block_reader),
            stdin=subprocess.DEVNULL,
            stdout=error_writer,
            stderr=error_writer,
            pass_fds=(*fds, info_writer, block_reader),
            cwd="/",
        )

    try:
        try:
            if lender is not None and jail.needs_set_uid:
                raise unsafe(f"{jail.bwrap} is set-uid root")
            popen = parent.run(start)
        finally:
            for fd in (info_writer, block_reader, error_writer):
                os.close(fd)
        child = _read_child_pid(info_reader)
        if not born:
            cgroup.add(popen.pid)
            cgroup.add(child)
        if nice:
            os.setpriority(os.PRIO_PROCESS, child, os.getpriority(os.PRIO_PROCESS, 0) + nice)
        return Spawned(popen, child, error_reader, parent, lender)
    except (OSError, ValueError, KeyError) as error:
        words = _end(popen, error_reader, parent)
        if lender is not None:
            raise unsafe(lender.refusal or words or str(error)) from error
        raise HostError(
            f"bubblewrap could not set up QEMU's jail ({words or error}); "
            "run `sandbox-kernel doctor` and look at user namespaces and cgroups."
        ) from error
    except BaseException:
        _end(popen, error_reader, parent)
        raise
    finally:
        os.close(info_reader)
        with suppress(BrokenPipeError):
            os.write(block_writer, b"\n")
        os.close(block_writer)


def unsafe(reason: str) -> TemplateUnsafeError:
    """The error for a QEMU that cannot have its RAM, as it could write to it otherwise."""
    return TemplateUnsafeError(
        f"QEMU before 8.2 cannot be given a template's RAM without the right to write to it here ({reason}); "
        "install QEMU 8.2 or later."
    )


def _end(popen: subprocess.Popen[bytes] | None, errors: int, parent: ParentThread | Lender) -> str:
    """Ends what has come to life, and returns the last it said."""
    words = b""
    if popen is not None:
        popen.kill()
        popen.wait()
        os.set_blocking(errors, False)
        with suppress(BlockingIOError):
            words = os.read(errors, _WORDS)
    os.close(errors)
    parent.close()
    return " | ".join(words.decode("utf-8", "replace").split("\n")).strip(" |")


def _read_child_pid(fd: int) -> int:
    """The PID that bubblewrap reports on `--info-fd`."""
    deadline = time.monotonic() + _DEADLINE
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    text = b""
    while b"}" not in text:
        left = deadline - time.monotonic()
        data = os.read(fd, 4096) if left > 0 and poll.poll(left * 1000) else b""
        if not data:
            raise ValueError(
                "it ended before it began" if left > 0 else f"nothing came of it in {_DEADLINE:g} s"
            )
        text += data
    return int(json.loads(text)["child-pid"])
