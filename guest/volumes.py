"""Volumes: disks of the host that outlive this guest, each with an ext4 of its own.

The host plugs them in before it asks for a kernel, into a guest that runs. Without ACPI nothing tells Linux
so: it is made to look for new devices (pci.rst, `rescan`), and each is known by its serial number.

At the end of the VM the host has them frozen (`FIFREEZE`, ioctl_fsfreeze(2) and ext4's freeze): all is
written out, the journal is empty, and no process needs to be asked to let go of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

import fields
import mounts
import system
from agent_protocol import MAX_VOLUMES
from answer import Refused
from fields import Request

_BLOCKS = "/sys/block"
_RESCAN = "/sys/bus/pci/rescan"
_SECONDS = 20.0
_LOOK = 0.01
_RESCAN_EVERY = 50
"""Looks in vain until Linux is made to look again."""
_LONGEST = 4096
_LONGEST_SERIAL = 20
"""Of a virtio disk (virtio 1.2, 5.2.6.1)."""
_FIFREEZE = 0xC0045877
_FLAGS = system.MS_NOSUID | system.MS_NODEV | system.MS_NOATIME
_OPTIONS = "commit=1,discard,errors=remount-ro,noinit_itable"
"""A guest can be gone at any moment. Files that are deleted are to take no room on the host; there, a new
volume is full of zeros already."""
_IN_MEMORY = (
    ("dirty_expire_centisecs", "100"),
    ("dirty_writeback_centisecs", "100"),
    ("dirty_background_bytes", "4194304"),
    ("dirty_bytes", "33554432"),
)
"""How long, and how much of, what is written may be in memory alone, for the same reason (sysctl/vm.rst)."""


class Volumes:
    """The volumes of one guest."""

    def __init__(self) -> None:
        self._roots: list[int] = []
        """Descriptors of those that can be written to."""

    def attach(self, wanted: list[Volume]) -> None:
        """Mounts all of them, an outer one before an inner one.

        Raises:
            Refused: one cannot be mounted.
        """
        writable = any(not volume.read_only for volume in wanted)
        for volume in sorted(wanted, key=lambda volume: volume.target.count("/")):
            try:
                device = await_device(volume.serial)
                mounts.prepare(volume.target)
                self._mount(volume, device)
            except OSError as error:
                if volume.read_only and error.errno == errno.EROFS:
                    # Linux' word for a journal that is not empty on a disk that it cannot write to.
                    raise Refused("unclean", volume.target) from error
                raise Refused("volume", f"{volume.target}: {error.strerror or error}") from error
        if writable:
            for name, value in _IN_MEMORY:
                system.write(f"/proc/sys/vm/{name}", value)

    def freeze(self) -> None:
        """Has all of them written out, and nothing more written to them, for good.

        Raises:
            OSError: one cannot be; the others are.
        """
        failed = None
        for root in self._roots:
            try:
                fcntl.ioctl(root, _FIFREEZE, 0)
            except OSError as error:
                failed = error
        if failed is not None:
            raise failed

    def _mount(self, volume: Volume, device: str) -> None:
        if volume.read_only:
            system.mount(device, volume.target, "ext4", _FLAGS | system.MS_RDONLY)
            return
        system.mount(device, volume.target, "ext4", _FLAGS, _OPTIONS)
        self._roots.append(os.open(volume.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))


class Volume:
    """One volume: the serial number of its disk, where it is mounted, whether for reading only."""

    def __init__(self, request: Request) -> None:
        """Raises ValueError over a field that makes no sense."""
        self.serial = fields.text(request, "serial", _LONGEST_SERIAL)
        self.target = fields.text(request, "target", _LONGEST)
        self.read_only = request.get("read_only") is True


def parse(request: Request) -> list[Volume]:
    """The volumes that a request names; none when it has none.

    Raises:
        ValueError: a field makes no sense.
    """
    found = request.get("volumes", [])
    if not isinstance(found, list) or len(found) > MAX_VOLUMES:
        raise ValueError(f"volumes is a list of at most {MAX_VOLUMES} objects")
    return [Volume(fields.mapping({"volume": each}, "volume")) for each in found]


def await_device(serial: str, blocks: str = _BLOCKS, rescan: str = _RESCAN) -> str:
    """Path of the disk with that serial number, once it is there.

    Raises:
        OSError: it does not come.
    """
    deadline = time.monotonic() + _SECONDS
    looks = 0
    while True:
        for name in os.listdir(blocks):
            if _serial(f"{blocks}/{name}/serial") == serial and os.path.exists(f"/dev/{name}"):
                return f"/dev/{name}"
        if time.monotonic() > deadline:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), serial)
        if looks % _RESCAN_EVERY == 0:
            system.write(rescan, "1")
        looks += 1
        time.sleep(_LOOK)


def _serial(path: str) -> str:
    try:
        return system.read(path).strip()
    except OSError:  # not every disk has one
        return ""
