"""Host directories in this guest: 9p2000.L, spoken by Linux over a vsock connection that the host has made.

The connection that asks for a mount becomes the mount's own: nothing is answered on it, and Linux takes it
(mount(2), `trans=fd`; Documentation/filesystems/9p.rst). What came of it is asked for by name on another
connection. A mount that a kernel begins with waits until the guest is configured, as its scratch disk may lie
over what it is mounted on.
"""

from __future__ import annotations

import os
import stat
import threading

import system
from agent_protocol import MAX_MOUNTS, MOUNT_MESSAGE, MOUNT_ROOT
from answer import Refused
from settings import Settings

_PATIENCE = 30.0
_MNT_DETACH, _UMOUNT_NOFOLLOW = 2, 8
_SEARCH = stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH


class Mounts:
    """The mounts of one guest."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._changed = threading.Condition()
        self._open = False
        self._expected: list[str] = []
        self._targets: dict[str, str | None] = {}
        """What came of each: None while it is under way, nothing when it is mounted, else why it is not."""

    def allow(self, expected: list[str]) -> None:
        """The guest is configured: from now on they are made, and of those expected an outer one first."""
        with self._changed:
            self._open, self._expected = True, expected
            self._changed.notify_all()

    def make(self, target: str, read_only: bool, connection: int) -> None:
        """Mounts what the host serves on `connection`, a descriptor that stays the caller's.

        Returns when it is mounted, or cannot be.

        Raises:
            Refused: there is a mount already, or there are too many.
        """
        with self._changed:
            if self._targets.get(target, "gone") in (None, ""):
                raise Refused("failed", f"mount: something is mounted on {target} already")
            if len(self._targets) >= MAX_MOUNTS and target not in self._targets:
                raise Refused("failed", f"mount: there are {MAX_MOUNTS} mounts, which is the most")
            self._targets[target] = None
            allowed = self._changed.wait_for(lambda: self._may_make(target), _PATIENCE)
        try:
            if not allowed:
                raise TimeoutError("the guest was not configured in time")
            prepare(target)
            system.mount("sandbox", target, "9p", *self._how(read_only, connection))
            outcome = ""
        except OSError as error:
            outcome = str(error.strerror or error)
        with self._changed:
            self._targets[target] = outcome
            self._changed.notify_all()

    def _may_make(self, target: str) -> bool:
        outer = (each for each in self._expected if target.startswith(f"{each}/"))
        return self._open and all(self._targets.get(each) is not None for each in outer)

    def await_made(self, target: str) -> None:
        """Returns when it is mounted.

        Raises:
            Refused: it cannot be, or takes too long.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._targets.get(target) is not None, _PATIENCE)
            outcome = self._targets.get(target)
            if outcome:
                del self._targets[target]  # it is told once, and may be tried again
        if outcome != "":
            raise Refused("mount", f"{target}: {outcome or 'the host does not serve it'}")

    def remove(self, target: str) -> None:
        """Takes a mount away; who has files open there gets errors when the host hangs up.

        Raises:
            OSError: there is none.
        """
        system.unmount(target, _MNT_DETACH | _UMOUNT_NOFOLLOW)
        with self._changed:
            del self._targets[target]

    def _how(self, read_only: bool, connection: int) -> tuple[int, str]:
        """Flags and options of mount(2).

        All users of this guest are one to the host: the kernel's user, to whom the directory belongs.
        `cache=mmap` lets files be mapped for writing; all else goes to the host at once.
        """
        settings = self._settings
        options = {
            "trans": "fd",
            "rfdno": connection,
            "wfdno": connection,
            "version": "9p2000.L",
            "aname": MOUNT_ROOT,
            "uname": settings.user,
            "dfltuid": settings.uid,
            "dfltgid": settings.gid,
            "access": "any",
            "msize": MOUNT_MESSAGE,
            "cache": "mmap",
        }
        flags = system.MS_NOSUID | system.MS_NODEV | (system.MS_RDONLY if read_only else 0)
        return flags, ",".join(f"{name}={value}" for name, value in options.items())


def prepare(target: str) -> None:
    """Makes the directory to mount on, which everybody can reach, as /root in a usual guest cannot be.

    Raises:
        OSError: it cannot be made, or a link leads elsewhere.
    """
    os.makedirs(target, exist_ok=True)
    if os.path.realpath(target) != target:
        raise OSError(f"a link leads from there to {os.path.realpath(target)[:200]}")
    above = target
    while (above := os.path.dirname(above)) != "/":
        mode = os.stat(above).st_mode
        if mode & _SEARCH != _SEARCH:
            os.chmod(above, stat.S_IMODE(mode) | _SEARCH)
