"""The scratch disk: what the kernel's user writes goes there, where the VM has one.

It comes with an empty ext4, maybe only after a restore. The user can write to three places: to home, which is
laid over what is there (overlayfs.rst), and to /tmp and /var/tmp, which are replaced.
"""

from __future__ import annotations

import errno
import os
import time

import system
from settings import Settings

_DEVICE = "/dev/vdb"
_PLACE = "/run/scratch"
_SECONDS = 10.0
_LOOK = 0.005
_FLAGS = system.MS_NOSUID | system.MS_NODEV


def use(settings: Settings) -> None:
    """Mounts it; once.

    Raises:
        OSError: it does not come, or has no file system.
    """
    _wait_for(_DEVICE)
    os.mkdir(_PLACE, 0o700)
    system.mount(_DEVICE, _PLACE, "ext4", _FLAGS)
    os.chmod(_PLACE, 0o700)
    for name, mode, owner in (("home", 0o700, settings.uid), ("work", 0o700, 0), ("tmp", 0o1777, 0)):
        os.mkdir(f"{_PLACE}/{name}")
        os.chown(f"{_PLACE}/{name}", owner, owner and settings.gid)
        os.chmod(f"{_PLACE}/{name}", mode)
    layers = f"lowerdir={settings.home},upperdir={_PLACE}/home,workdir={_PLACE}/work"
    system.mount("home", settings.home, "overlay", _FLAGS, layers)
    for folder in ("/tmp", "/var/tmp"):
        system.mount(f"{_PLACE}/tmp", folder, "", system.MS_BIND)


def _wait_for(device: str) -> None:
    deadline = time.monotonic() + _SECONDS
    while not os.path.exists(device):
        if time.monotonic() > deadline:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), device)
        time.sleep(_LOOK)
