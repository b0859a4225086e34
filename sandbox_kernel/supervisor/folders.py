"""A VM's two folders, who may use them, and what happens to those that nobody owns any more.

    runtime/<id>   sockets; the id is stable over restarts, so that clients find the same endpoints again
    logs/<id>-…      console.log, qemu.log, supervisor.log; removed with the VM unless an error names it

The owner of a runtime folder holds a lock (flock(2)) on the folder itself. The guardian inherits it and lets
go when it has removed the folder, so the next VM of the same id waits until the last one is cleaned up. A
folder that can be locked belongs to nobody: its supervisor and guardian were both killed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import HostError, NoSpaceError
from sandbox_kernel.jail.guardian import Guardian

KEPT_LOGS = 20
"""Folders of logs of failed VMs that are kept; older ones go."""
_PATIENCE = 5.0
_CLEARED = 1.0
"""Seconds for the guardian of somebody who was killed; who asks for what somebody has waits as long."""
_POLL = 0.01


@dataclass(frozen=True)
class Folders:
    """The folders of one VM, locked for this process.

    Attributes:
        runtime: sockets.
        logs: logs.
        lock: descriptor that holds the lock on `runtime`.
    """

    runtime: Path
    logs: Path
    lock: int


def claim(vm: str) -> Folders:
    """Makes and locks the folders of the VM with id `vm`; waits for the clean-up of a predecessor.

    Raises:
        HostError: another living VM has this id.
        NoSpaceError: the file system is full; other reasons are a HostError, too.
    """
    base = paths.runtime_dir()
    logs = paths.log_dir() / f"{vm}-{time.time_ns():x}-{os.getpid()}"
    sweep(base)
    try:
        lock = _lock(base / vm)
        logs.mkdir(parents=True, mode=0o700)
    except OSError as error:
        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
        raise kind(
            f"The VM's folders cannot be made ({error.strerror}: {error.filename}); make room there."
        ) from error
    _prune(logs.parent)
    return Folders(base / vm, logs, lock)


@contextmanager
def vacated(vm: str) -> Iterator[Path]:
    """The runtime folder for the id `vm`, empty and nobody else's for as long as this lasts.

    Waits for the clean-up of a predecessor.

    Raises:
        HostError: another living VM has this id.
    """
    place = paths.runtime_dir() / vm
    lock = _lock(place)
    try:
        yield place
    finally:
        os.close(lock)


def move(folders: Folders, place: Path) -> Folders:
    """Gives the runtime folder the path of a vacated one, which it replaces in one step; the lock stays.

    Raises:
        OSError: `place` is not an empty folder of the same file system.
    """
    folders.runtime.rename(place)
    return replace(folders, runtime=place)


def sweep(base: Path) -> None:
    """Removes runtime folders below `base` whose owners are all dead."""
    for folder in base.iterdir():
        with _try_lock(folder) as lock:
            if lock is not None:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def reserved(name: str) -> Iterator[Path]:
    """A runtime folder for something of which a user has one at a time; removed whatever its end.

    Raises:
        HostError: somebody has it already, or it cannot be made.
    """
    folder = paths.runtime_dir() / name
    try:
        lock = _lock(folder, _CLEARED)
    except OSError as error:
        raise HostError(f"The folder {folder} cannot be made ({error.strerror}); make room there.") from error
    try:
        for left in folder.iterdir():
            left.unlink()
        guardian = Guardian(folder, None, (), hold=(lock,))
        try:
            yield folder
        finally:
            guardian.dismiss()
    finally:
        os.close(lock)


def _lock(folder: Path, patience: float | None = None) -> int:
    deadline = time.monotonic() + (_PATIENCE if patience is None else patience)
    while True:
        folder.mkdir(mode=0o700, exist_ok=True)
        try:
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.path.samestat(os.fstat(fd), folder.stat()):
                return fd
        except (BlockingIOError, FileNotFoundError):
            time.sleep(_POLL)
        os.close(fd)
        if time.monotonic() >= deadline:
            raise HostError(f"Another VM owns {folder}; shut that kernel down first.")


@contextmanager
def _try_lock(folder: Path) -> Iterator[int | None]:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        yield None
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield fd
    except BlockingIOError:
        yield None
    finally:
        os.close(fd)


def _prune(base: Path) -> None:
    """Keeps the newest `KEPT_LOGS` folders of VMs that are gone."""
    gone = [folder for folder in base.iterdir() if not _lives(folder.name)]
    gone.sort(key=_changed, reverse=True)
    for folder in gone[KEPT_LOGS:]:
        shutil.rmtree(folder, ignore_errors=True)


def _changed(folder: Path) -> float:
    """When; long ago for one that its guardian has removed meanwhile."""
    try:
        return folder.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _lives(name: str) -> bool:
    pid = re.search(r"-(\d+)$", name)
    return pid is not None and Path("/proc", pid[1]).exists()
