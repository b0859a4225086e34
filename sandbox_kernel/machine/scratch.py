"""A VM's scratch disk: a file without a name, with an empty file system in it.

It has no name from the beginning (O_TMPFILE, open(2)), so whatever happens to whom, its space is free again
when QEMU is gone. It takes room as it fills; its size is what the guest can have of it at most.
"""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.errors import HostError, NoSpaceError
from sandbox_kernel.jail import bubblewrap

_SECONDS = 30.0
_FEATURES = (
    "extent,flex_bg,metadata_csum,sparse_super,large_file,huge_file,dir_nlink,extra_isize,^has_journal"
)
"""Of ext4(5), independent of this host's mke2fs.conf. No journal: nobody will ever see it after a crash."""
_NO_ROOM = "No space left"


def make(size: int) -> int:
    """A new scratch disk.

    Args:
        size: MiB.

    Returns:
        Its descriptor, the caller's.

    Raises:
        MissingToolError: e2fsprogs is not installed.
        NoSpaceError: there is no room for an empty one.
        HostError: the folder cannot hold such a file.
    """
    mke2fs = _find()
    folder = paths.cache_dir()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(_no_room(folder, str(error.strerror))) from error
        raise HostError(
            f"A scratch disk cannot be made in {folder} ({error.strerror}); point XDG_CACHE_HOME at a file "
            "system that knows O_TMPFILE, or leave `disk` out."
        ) from error
    try:
        os.ftruncate(fd, size << 20)
        _format(mke2fs, fd, folder)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _find() -> Path:
    for folder in ("/usr/sbin", "/sbin"):  # not on every user's search path
        path = Path(folder) / "mke2fs"
        if path.exists():
            return path
    return bubblewrap.find("mke2fs", "install e2fsprogs, or leave `disk` out")


def _format(mke2fs: Path, fd: int, folder: Path) -> None:
    done = subprocess.run(
        [
            *(str(mke2fs), "-q", "-F", "-t", "ext4", "-m", "0", "-O", _FEATURES),
            *("-E", "lazy_itable_init=1,nodiscard", f"/proc/self/fd/{fd}"),
        ],
        pass_fds=(fd,),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_SECONDS,
        env={"LC_ALL": "C", "MKE2FS_CONFIG": os.devnull},
    )
    if done.returncode:
        kind = NoSpaceError if _NO_ROOM in done.stderr else HostError
        raise kind(_no_room(folder, " ".join(done.stderr.split())[-200:]))


def _no_room(folder: Path, reason: str) -> str:
    return f"A scratch disk cannot be made in {folder} ({reason}); make room there."
