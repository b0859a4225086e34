"""Volumes: named files with an ext4 in them, of limited size, which outlive the kernels that use them.

    volumes/          mode 0700, in the data directory
      results         sparse: it takes on the host what has been written to it, at most its size
      models

A volume appears under its name complete or not at all: until then its file has none (O_TMPFILE, open(2)).

Who attaches one opens its file and takes a lock on that (flock(2)): alone for writing, with others for
reading. QEMU gets the same open file, so the lock lasts until the last of supervisor and QEMU is gone, in
whatever way, and nobody can write to a volume when the next kernel gets it. For reading the file is opened
for reading: no QEMU can write to it, whoever has taken it over.

What is in a volume was written by guests, which may be hostile. So the host never mounts it, nor checks or
repairs it, nor looks into it: that is for the Linux of the next guest.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel import paths, volume
from sandbox_kernel.agent.protocol import KERNEL_USER
from sandbox_kernel.errors import ConfigurationError, HostError, NoSpaceError, VolumeBusy
from sandbox_kernel.files import ext4

SMALLEST, LARGEST = 16, 4 << 20
"""MiB of a volume."""
_LOCKS = Path("/proc/locks")
_SECONDS = 60.0
_ALONE = "shut that kernel down, or have all of them attach it read-only"
_TOGETHER = "shut that kernel down, or have it attach the volume read-only, too"


@dataclass(frozen=True)
class Holder:
    """Somebody who has a volume attached: the process id of a supervisor, and whether it may write."""

    pid: int
    writable: bool


@dataclass(frozen=True)
class Stored:
    """One volume in the store.

    Attributes:
        name: its own.
        size: bytes that there is room for.
        used: bytes that it takes on the host.
        attached: whether it is attached to a kernel.
        holders: by whom, as far as this can be known.
    """

    name: str
    size: int
    used: int
    attached: bool
    holders: tuple[Holder, ...]


class VolumeStore:
    """The volumes of one user."""

    def __init__(self, directory: Path | None = None) -> None:
        """`directory` is made when a volume is; the XDG data directory's when None."""
        self.directory = directory or paths.data_dir() / "volumes"

    def create(self, name: str, size: int) -> None:
        """Makes a volume.

        Args:
            name: as `volume.NAME` describes it.
            size: MiB, from `SMALLEST` to `LARGEST`.

        Raises:
            ConfigurationError: name or size are not allowed, or there is one of that name.
            MissingToolError: e2fsprogs is not installed.
            NoSpaceError: there is no room for an empty one.
            HostError: the folder cannot hold such a file.
        """
        path = self._path(name)
        if not SMALLEST <= size <= LARGEST:
            raise ConfigurationError(
                f"The volume {name} is to have {size} MiB; allowed are {SMALLEST} to {LARGEST} MiB."
            )
        if path.exists():
            raise _exists(name)
        mke2fs = ext4.find("do without volumes")
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._cannot(name, error) from error
        try:
            fd = os.open(self.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                os.ftruncate(fd, size << 20)
                ext4.make(mke2fs, fd, True, KERNEL_USER, _SECONDS)
                os.fsync(fd)
                os.link(f"/proc/self/fd/{fd}", name, dst_dir_fd=folder)  # with follow_symlinks: open(2)
            finally:
                os.close(fd)
        except FileExistsError as error:
            raise _exists(name) from error
        except OSError as error:
            raise self._cannot(name, error) from error
        except HostError as error:
            raise type(error)(
                f"The volume {name} cannot be made in {self.directory} ({error}); make room there."
            ) from error
        finally:
            os.close(folder)

    def all(self) -> list[Stored]:
        """Every volume, by name."""
        found = []
        with suppress(FileNotFoundError):
            for path in sorted(self.directory.iterdir()):
                if re.fullmatch(volume.NAME, path.name):
                    with suppress(OSError):
                        found.append(_look_at(path))
        return found

    def remove(self, name: str) -> None:
        """Deletes a volume and all that is in it.

        Raises:
            ConfigurationError: there is none of that name.
            VolumeBusy: it is attached.
            HostError: it cannot be deleted.
        """
        try:
            fd = self.hold(name, True)
        except VolumeBusy as error:
            raise VolumeBusy(
                _busy(name, "shut that kernel down to remove it", holders(self._path(name)))
            ) from error
        try:
            self._path(name).unlink()
        except OSError as error:
            raise HostError(
                f"The volume {name} cannot be removed ({error.strerror}); look at {self.directory}."
            ) from error
        finally:
            os.close(fd)

    def hold(self, name: str, writable: bool) -> int:
        """Takes a volume, for as long as the descriptor that is returned is open, here or elsewhere.

        Args:
            name: which.
            writable: alone and for writing, or together with others for reading.

        Raises:
            ConfigurationError: there is none of that name.
            VolumeBusy: somebody has it.
            HostError: it cannot be opened.
        """
        path = self._path(name)
        how = os.O_RDWR if writable else os.O_RDONLY
        try:
            fd = os.open(path, how | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError as error:
            raise self._missing(name) from error
        except OSError as error:
            raise HostError(
                f"The volume {name} cannot be opened ({error.strerror}: {path}); mend that."
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise HostError(f"{path} is no volume, as it is no file; remove it.")
            try:
                fcntl.flock(fd, (fcntl.LOCK_EX if writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError as error:
                fix = _ALONE if writable else _TOGETHER
                raise VolumeBusy(_busy(name, fix, holders(path))) from error
            if os.fstat(fd).st_nlink == 0:  # it was removed between the two
                raise self._missing(name)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _path(self, name: str) -> Path:
        if not re.fullmatch(volume.NAME, name):
            raise ConfigurationError(
                f"{name[:80]!r} is no name for a volume; use up to 64 lower-case letters, digits, `_`, `.` "
                "and `-`, beginning with a letter or digit."
            )
        return self.directory / name

    def _missing(self, name: str) -> ConfigurationError:
        there = ", ".join(each.name for each in self.all()[:20]) or "none"
        return ConfigurationError(
            f"There is no volume {name} (there are: {there}); make it with "
            f"`sandbox-kernel volume create {name} --size MIB`."
        )

    def _cannot(self, name: str, error: OSError) -> HostError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpaceError(
                f"The volume {name} cannot be made in {self.directory} ({error.strerror}); make room there."
            )
        return HostError(
            f"The volume {name} cannot be made in {self.directory} ({error.strerror}); point XDG_DATA_HOME "
            "at a file system that knows O_TMPFILE and sparse files of that size."
        )


def holders(path: Path) -> tuple[Holder, ...]:
    """Who has a lock on the file `path`, as Linux tells (proc_locks(5)), without those it does not show."""
    found = set()
    try:
        there = path.stat()
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return ()
    for line in lines:
        # 1: FLOCK  ADVISORY  WRITE 759 fe:00:2154502 0 EOF
        words = line.split()
        if len(words) == 8 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(there.st_ino):
            pid = int(words[4])
            # Some file systems have another device number there than in stat(2).
            if pid > 0 and _has_open(pid, there):
                found.add(Holder(pid, words[3] == "WRITE"))
    return tuple(sorted(found, key=lambda holder: holder.pid))


def _has_open(pid: int, there: os.stat_result) -> bool:
    with suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(link.stat(), there):
                    return True
    return False


def _look_at(path: Path) -> Stored:
    found = path.lstat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "no volume")
    attached = _is_held(path)
    return Stored(
        path.name, found.st_size, found.st_blocks * 512, attached, holders(path) if attached else ()
    )


def _is_held(path: Path) -> bool:
    """Whether somebody has it: found by a lock that is let go of at once."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _exists(name: str) -> ConfigurationError:
    return ConfigurationError(f"There is a volume {name} already; remove it, or choose another name.")


def _busy(name: str, fix: str, who: tuple[Holder, ...]) -> str:
    where = "to another kernel"
    if who:
        how = "read-write" if any(holder.writable for holder in who) else "read-only"
        pids = ", ".join(str(holder.pid) for holder in who[:4])
        where = f"{how} to the kernel of supervisor {pids}, which `sandbox-kernel ps` shows"
    return f"The volume {name} is attached {where}; {fix}."
