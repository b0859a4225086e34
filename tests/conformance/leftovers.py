"""What a suite leaves behind: processes below this one, and files in its runtime directory.

This process makes itself the reaper of its descendants (prctl(2), PR_SET_CHILD_SUBREAPER). Whatever a suite
starts, in whichever session, and however its parents die, stays below this process in the tree: the search
for what is left is exact, and concerns no process that somebody else started.
"""

from __future__ import annotations

import ctypes
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

GRACE = 5.0
"""Seconds within which everything has to be gone once a suite has ended; users are promised 2."""
_POLL = 0.05
_SET_CHILD_SUBREAPER = 36
_OURS = ("qemu-system", "bwrap", "sandbox_kernel", "sandbox-kernel")


@dataclass(frozen=True)
class Leftovers:
    """What was left.

    Attributes:
        processes: command lines of ours.
        strangers: command lines of others; a suite's own affair, for the record.
        files: in the runtime directory.
    """

    processes: tuple[str, ...] = ()
    strangers: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether nothing of ours was left."""
        return not self.processes and not self.files


def become_reaper() -> None:
    """Makes this process the parent of every descendant that loses its own.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def collect(runtime: Path) -> Leftovers:
    """Waits until nothing is left or the grace is over, ends what is left, and tells what it was.

    Args:
        runtime: the XDG runtime directory that the suite was given.
    """
    deadline = time.monotonic() + GRACE
    while (alive := _alive()) or _files(runtime):
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL)
    names = {process: _command(process) for process in alive}
    found = Leftovers(
        processes=tuple(name for name in names.values() if is_ours(name)),
        strangers=tuple(name for name in names.values() if not is_ours(name)),
        files=tuple(map(str, _files(runtime))),
    )
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=GRACE)
    _alive()
    return found


def is_ours(command: str) -> bool:
    """Whether a command line is that of a micro-VM's processes."""
    return any(word in command for word in _OURS)


def _alive() -> list[psutil.Process]:
    """Descendants that live; dead ones that came to this process are reaped."""
    alive = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process)
            elif process.ppid() == os.getpid():
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)
    return alive


def _files(runtime: Path) -> list[Path]:
    """What lies in our part of the runtime directory."""
    folder = runtime / "sandbox-kernel"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return f"process {process.pid}"
