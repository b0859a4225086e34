"""New ext4 file systems in files of the host, by mke2fs(8), without root."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

from sandbox_kernel.errors import HostError, NoSpaceError
from sandbox_kernel.jail import bubblewrap

_FEATURES = "extent,flex_bg,metadata_csum,sparse_super,large_file,huge_file,dir_nlink,extra_isize"
"""Of ext4(5), independent of this host's mke2fs.conf."""
FOLDERS = (Path("/usr/sbin"), Path("/sbin"))
"""Where the program is, which are not on every user's search path."""
_FULL = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))


def find(without: str) -> Path:
    """Path of mke2fs.

    Args:
        without: what to do where it is not to be installed, as the rest of a sentence.

    Raises:
        MissingToolError: e2fsprogs is not installed.
    """
    for folder in FOLDERS:
        path = folder / "mke2fs"
        if path.exists():
            return path
    return bubblewrap.find("mke2fs", f"install e2fsprogs, or {without}")


def make(mke2fs: Path, fd: int, journal: bool, owner: int, seconds: float) -> None:
    """Makes a file system, as large as the file, which is new and therefore full of zeros.

    Args:
        mke2fs: from `find`.
        fd: descriptor of the file.
        journal: whether it is to be of use after a crash.
        owner: numeric id of the user and group to whom its root belongs.
        seconds: that it may take.

    Raises:
        NoSpaceError: there is no room for an empty one; the text is mke2fs' own.
        HostError: it could not be made; likewise.
    """
    features = f"{_FEATURES},{'' if journal else '^'}has_journal"
    options = f"lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner={owner}:{owner}"
    try:
        done = subprocess.run(
            [
                *(str(mke2fs), "-q", "-F", "-t", "ext4", "-b", "4096", "-i", "8192", "-I", "256", "-m", "0"),
                *("-O", features, "-E", options, f"/proc/self/fd/{fd}"),
            ],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            env={"LC_ALL": "C", "MKE2FS_CONFIG": os.devnull},
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"mke2fs took more than {seconds:g} s") from error
    if done.returncode:
        kind = NoSpaceError if any(word in done.stderr for word in _FULL) else HostError
        raise kind(" ".join(done.stderr.split())[-200:])
