"""What a VM has on the host beside its processes: folders, a cgroup, a log, and who clears them away."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_kernel.errors import HostError
from sandbox_kernel.jail import cgroup
from sandbox_kernel.jail.guardian import Guardian
from sandbox_kernel.logfile import log_to
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor import folders

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)


_ENFORCES = {
    "memory": "what QEMU takes beyond the guest's `memory`",
    "pids": "QEMU's threads",
    "cpu": "`cpu_quota`",
}


def unenforced(missing: Mapping[str, str]) -> str:
    """What is not bounded where these controllers are missing, each with the reason."""
    return "; ".join(f"{_ENFORCES[name]} is not bounded ({reason})" for name, reason in missing.items())


class Belongings:
    """The belongings of one VM, from their making to the end of this process."""

    def __init__(self, vm: str, spec: VMSpec, control_fd: int) -> None:
        """Makes them.

        Args:
            vm: the VM's id, which names them.
            spec: what it may have.
            control_fd: closed for good only when everything is cleared away; the client sees that.

        Raises:
            HostError: another living VM has this id, a folder cannot be made, or a limit cannot be enforced
                and that is not to be put up with.
        """
        self._folders = folders.claim(vm)
        self._control_fd = control_fd
        self._sockets: list[str] = []
        self.cgroup = cgroup.create(vm, cgroup.Bounds(spec.memory, spec.vcpus, spec.cpu_quota))
        self._post_guardian()
        log_to(self.logs / "supervisor.log")
        if self.cgroup.missing:
            reasons = unenforced(self.cgroup.missing)
            if spec.unenforced == "refuse":
                raise HostError(
                    f"This host does not enforce all limits ({reasons}) and unenforced = 'refuse'; have a "
                    "part of cgroup v2 delegated to this user, or choose unenforced = 'warn'."
                )
            log.warning("this host does not enforce all limits: %s", reasons)

    @property
    def logs(self) -> Path:
        """Folder of the VM's logs."""
        return self._folders.logs

    @property
    def runtime(self) -> Path:
        """Folder of the VM's sockets."""
        return self._folders.runtime

    def keep_logs(self) -> None:
        """The logs are named in an error and shall outlive the VM."""
        self._guardian.keep_logs()

    def guard(self, socket: str) -> None:
        """Has the guardian remove a Unix socket at the end, `DEVICE:INODE PATH`, if it is still that one."""
        self._sockets.append(socket)
        self._guardian.guard(socket)

    def release(self, socket: str) -> None:
        """Has it leave the socket alone from now on."""
        self._sockets.remove(socket)
        self._guardian.release(socket)

    def rename(self, vm: str) -> None:
        """Takes the id `vm` for the folder of sockets, once nobody else has it.

        Raises:
            HostError: another living VM has this id.
        """
        with folders.vacated(vm) as place:
            self._guardian.also(place)
            self._folders = folders.move(self._folders, place)

    def watch_guardian(self, loop: asyncio.AbstractEventLoop) -> None:
        """Has `loop` post another guardian whenever this one is killed."""
        pidfd = os.pidfd_open(self._guardian.pid)

        def again() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._guardian.reap()
            log.warning("the guardian was killed; another one takes over")
            self._post_guardian()
            self.watch_guardian(loop)

        loop.add_reader(pidfd, again)

    def _post_guardian(self) -> None:
        self._guardian = Guardian(
            self._folders.runtime,
            self._folders.logs,
            self.cgroup.folders,
            hold=(self._folders.lock, self._control_fd),
        )
        for socket in self._sockets:
            self._guardian.guard(socket)
