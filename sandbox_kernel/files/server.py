"""The program that serves one directory, diod(8), in a jail that holds just that directory.

It speaks 9p2000.L on an inherited socket, with no listener and no configuration. What the guest may make of
it: links and `..` are looked up in the jail, where there is nothing else; a read-only mount is one by
the jail's own mount table; no device node can be made or opened; no network, no capability. In there the
directory belongs to the guest kernel's user, who is this process's user outside.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

from sandbox_kernel import paths
from sandbox_kernel.agent.protocol import KERNEL_USER, MOUNT_ROOT
from sandbox_kernel.errors import ConfigurationError
from sandbox_kernel.jail.bubblewrap import confined, find
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.jail.parent import ParentThread
from sandbox_kernel.jail.words import Words
from sandbox_kernel.mount import Mount

_PASSWD = Path(__file__).with_name("passwd")
"""The one user of a guest that is known to the server (passwd(5)): Linux attaches by name first."""
_THREADS = 4
_MEMORY = 192 << 20
"""Bytes that it may allocate: a guest can have it remember any number of files."""
_OPEN_FILES = 1024
_KILLED = 1.0
_WORDS = 2048
_LOOKED_AT = 100
"""Entries of a directory."""


class FileServer:
    """A running server of one directory."""

    def __init__(self, popen: subprocess.Popen[bytes], parent: ParentThread, words: Words) -> None:
        """See `start`."""
        self._popen, self._parent, self._words = popen, parent, words

    @property
    def pid(self) -> int:
        """Process id of its jail."""
        return self._popen.pid

    def last_words(self) -> str:
        """What it has said on standard error, on one line; to be asked once, when it has ended."""
        return self._words.take()[:_WORDS]

    def close(self) -> None:
        """Ends it."""
        self._popen.kill()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_KILLED)
        self._words.close()
        self._parent.close()


def start(mount: Mount, fd: int, cgroup: Cgroup) -> FileServer:
    """Starts a server.

    Args:
        mount: what it serves.
        fd: stream socket to the guest, blocking; stays the caller's.
        cgroup: the VM's, which it joins.

    Raises:
        ConfigurationError: the directory is not there, or is not to be seen by a guest.
        MissingToolError: a program is missing.
    """
    require(mount)
    argv = command(
        find("bwrap", "install the package bubblewrap"),
        find("diod", "install the package diod or take `mounts` out of the configuration"),
        mount,
        _not_shown(),
        fd,
    )
    parent, words = ParentThread(), Words()

    def begin() -> subprocess.Popen[bytes]:
        born = cgroup.join()
        popen = subprocess.Popen(
            limited(argv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words.end,
            pass_fds=(fd,),
            cwd="/",
        )
        if not born:
            cgroup.add(popen.pid)
        return popen

    try:
        started = FileServer(parent.run(begin), parent, words)
    except BaseException:
        words.close()
        raise
    words.begun()
    return started


def require(mount: Mount) -> None:
    """Sees to it that a mount's directory can be served.

    Raises:
        ConfigurationError: it cannot.
    """
    source = Path(mount.source)
    if not source.is_dir():
        raise ConfigurationError(
            f"{source} is to be mounted and is no directory on this host; make it, or change `mounts`."
        )
    real = source.resolve()
    for folder in _not_shown():
        if real.is_relative_to(folder):
            raise ConfigurationError(
                f"{source} is to be mounted and belongs to what keeps kernels apart ({folder}); choose "
                "another directory."
            )
    if _is_of_several(source):
        raise ConfigurationError(
            f"{source} lies on an overlay of several file systems, whose files cannot be served; mount a "
            "directory that lies elsewhere, on a disk or in a tmpfs."
        )


def _is_of_several(folder: Path) -> bool:
    """Whether files there are of other devices than the directory (overlayfs.rst, "Inode properties").

    The server takes such a file for a mount point, and then for a directory.
    """
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = (line.partition(" - ") for line in Path("/proc/self/mountinfo").read_text().splitlines())
    if not any(where.split()[2] == number and how.startswith("overlay ") for where, _, how in mounts):
        return False
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC)
        try:
            return os.fstat(fd).st_dev != device
        finally:
            os.close(fd)
    except OSError:  # it cannot be written to, so it is as it is
        with suppress(OSError), os.scandir(folder) as entries:
            files = [each for each in islice(entries, _LOOKED_AT) if each.is_file(follow_symlinks=False)]
            return any(each.stat(follow_symlinks=False).st_dev != device for each in files)
        return False


def command(bwrap: Path, diod: Path, mount: Mount, masked: Sequence[Path], fd: int) -> list[str]:
    """The argv of a jailed server.

    Args:
        bwrap: path of bubblewrap.
        diod: path of the server.
        mount: what it serves.
        masked: real paths of directories that are shown empty where they lie below the mount's.
        fd: inherited stream socket to the guest.
    """
    source = Path(mount.source).resolve()
    words = [
        *confined(bwrap, diod),
        *("--uid", str(KERNEL_USER), "--gid", str(KERNEL_USER)),
        *("--ro-bind", str(_PASSWD), "/etc/passwd"),
        *("--bind" if mount.writable else "--ro-bind", str(source), MOUNT_ROOT),
    ]
    for folder in masked:
        if folder.is_relative_to(source):
            place = f"{MOUNT_ROOT}/{folder.relative_to(source)}"
            words += ["--tmpfs", place, "--remount-ro", place]
    serve = ("-f", "-n", "-L", "stderr", "-t", str(_THREADS), "-e", MOUNT_ROOT)
    # A name with `..` in it must not make files in the jail's own root, which is memory of the host.
    words += ["--remount-ro", "/", "--chdir", "/"]
    return [*words, "--", str(diod), *serve, "-r", str(fd), "-w", str(fd)]


def limited(argv: Sequence[str]) -> list[str]:
    """`argv` with bounds on what a guest can make it take (prlimit(1))."""
    return ["prlimit", f"--data={_MEMORY}", f"--nofile={_OPEN_FILES}", "--core=0", "--", *argv]


def _not_shown() -> list[Path]:
    """Directories with which a guest could reach other kernels: their images, templates, sockets and keys."""
    jupyter = os.environ.get("JUPYTER_RUNTIME_DIR") or str(paths.data_dir().parent / "jupyter" / "runtime")
    folders = (paths.data_dir(), paths.cache_dir(), paths.runtime_dir(), paths.log_dir(), Path(jupyter))
    return [folder.resolve() for folder in folders if folder.is_dir()]
