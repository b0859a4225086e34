"""The host directories that one VM has mounted: served, asked for in the guest, taken away again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath

from sandbox_kernel.agent.protocol import AGENT_PORT, MAX_MOUNTS, pack
from sandbox_kernel.errors import ConfigurationError, GuestError, MountError
from sandbox_kernel.files import server
from sandbox_kernel.files.share import Share
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.machine.machine import Machine
from sandbox_kernel.mount import Mount, check

log = logging.getLogger(__name__)

_CONNECT = 10.0


class Shares:
    """The mounts of one machine."""

    def __init__(
        self, machine: Machine, cgroup: Cgroup, roots: Sequence[str] | None, tell: Callable[[str], None]
    ) -> None:
        """Nothing is mounted yet.

        Args:
            machine: whose guest has the mounts.
            cgroup: joined by what serves them.
            roots: what may be mounted (mount.py, `check`).
            tell: gets a sentence when a mount has reached a bound.
        """
        self._machine, self._cgroup, self._roots, self._tell = machine, cgroup, roots, tell
        self._shares: dict[PurePosixPath, Share] = {}

    @property
    def mounts(self) -> tuple[Mount, ...]:
        """What is mounted."""
        return tuple(share.mount for share in self._shares.values())

    async def begin(self, mounts: Sequence[Mount]) -> list[str]:
        """Serves directories and has the guest mount them, once it is configured.

        Returns:
            The targets, by which the agent is asked what came of it.

        Raises:
            ConfigurationError: one of them cannot be mounted.
            HostError: a tool is missing.
            MountError: the agent cannot be reached.
        """
        check((*self.mounts, *mounts), self._roots)
        if len(self._shares) + len(mounts) > MAX_MOUNTS:
            raise ConfigurationError(f"A VM has at most {MAX_MOUNTS} mounts; mount a directory above them.")
        for mount in mounts:
            server.require(mount)
        for mount in mounts:
            request = {"op": "mount", "target": str(mount.target), "read_only": not mount.writable}
            try:
                connection = await self._machine.vsock.connect(AGENT_PORT, _CONNECT)
                await asyncio.get_running_loop().sock_sendall(connection, pack(request))
            except OSError as error:
                raise MountError(
                    f"{mount.source} cannot be mounted, as the VM's agent cannot be reached ({error})."
                ) from error
            self._shares[mount.target] = Share(mount, connection, self._cgroup, self._tell)
        return [str(mount.target) for mount in mounts]

    async def add(self, mount: Mount) -> None:
        """Mounts a directory in a guest that runs.

        Raises:
            ConfigurationError, HostError, MountError: it cannot be mounted.
        """
        [target] = await self.begin((mount,))
        try:
            await (await self._machine.reachable_agent()).await_mounted(target)
        except GuestError as error:
            share = self._shares.pop(mount.target)
            try:
                raise self.explain(error, share) from error
            finally:
                await share.aclose()
        log.info("mounted: %s", mount)

    async def remove(self, target: str) -> None:
        """Takes a mount away; who has files open there gets errors.

        Raises:
            ConfigurationError: there is none.
            GuestError: the guest does not do it.
        """
        share = self._shares.get(PurePosixPath(target))
        if share is None:
            there = ", ".join(str(place) for place in self._shares) or "none"
            raise ConfigurationError(f"Nothing is mounted on {target}; there are: {there}.")
        try:
            await (await self._machine.reachable_agent()).unmount(target)
        finally:
            del self._shares[PurePosixPath(target)]
            await share.aclose()
        log.info("unmounted: %s", share.mount)

    def explain(self, error: GuestError, share: Share | None = None) -> GuestError:
        """`error`, with what the servers have said about it."""
        if not isinstance(error, MountError):
            return error
        said = [share.why()] if share else [each.why() for each in self._shares.values()]
        words = "; ".join(filter(None, said))
        return MountError(f"{str(error).removesuffix('.')}{f' ({words})' if words else ''}.")

    async def aclose(self) -> None:
        """Serves nothing any more; idempotent."""
        shares, self._shares = list(self._shares.values()), {}
        for share in shares:
            await share.aclose()
