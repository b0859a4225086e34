"""One mount, from the directory on the host to the guest that has it mounted.

    guest's Linux ═ 9p ═ vsock ═ jailed server (server.py) ─ directory
                           └ with a quota: this process reads what comes from the guest on its way (quota.py)

A share that breaks, for whatever reason, is a mount that fails in the guest (EIO); the VM goes on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import ExitStack

from sandbox_kernel.agent.protocol import MOUNT_MESSAGE
from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.files import server
from sandbox_kernel.files.quota import Messages, Quota
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.mount import Mount

log = logging.getLogger(__name__)

_PIECE = 256 * 1024
_BEYOND = 64
"""Bytes that a message may have beyond `msize`, of which some peers count the data only."""


class Share:
    """One served mount."""

    def __init__(self, mount: Mount, connection: socket.socket, cgroup: Cgroup, told: Callable[[str], None]):
        """Serves it from now on.

        Args:
            mount: what.
            connection: to the guest, owned from now on.
            cgroup: the VM's.
            told: gets a sentence once, when a bound is reached.

        Raises:
            ConfigurationError, MissingToolError: it cannot be served; the connection is closed.
        """
        self.mount = mount
        self._told = told
        self._stack = ExitStack()
        self._stack.enter_context(connection)
        self._pumps: list[asyncio.Task[None]] = []
        self._answers = asyncio.Lock()
        try:
            if mount.written or mount.files:
                near, far = socket.socketpair()
                near.setblocking(False)
                self._stack.enter_context(near)
            else:
                near, far = connection, connection
                connection.setblocking(True)
            try:
                self._server = server.start(mount, far.fileno(), cgroup)
            finally:
                far.close()  # the server's alone, so that its end is the connection's
            self._stack.callback(self._server.close)
        except BaseException:
            self._stack.close()
            raise
        if near is not far:
            quota = Quota.of(mount.written, mount.files)
            loop = asyncio.get_running_loop()
            self._pumps = [
                loop.create_task(self._up(connection, near, quota)),
                loop.create_task(self._down(near, connection)),
            ]

    def why(self) -> str:
        """What its server has said, for an error; empty when it said nothing."""
        return self._server.last_words()

    async def aclose(self) -> None:
        """Serves no more; idempotent."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self._stack.close()

    async def _up(self, guest: socket.socket, host: socket.socket, quota: Quota) -> None:
        """Passes on what the guest asks for, as far as it may."""
        messages, loop, refused = Messages(MOUNT_MESSAGE + _BEYOND), asyncio.get_running_loop(), False
        try:
            while data := await loop.sock_recv(guest, _PIECE):
                passed = bytearray()
                for message in messages.receive(data):
                    answer = quota.refuse(message)
                    if answer is None:
                        passed += message
                        continue
                    async with self._answers:
                        await loop.sock_sendall(guest, answer)
                    if not refused:
                        refused = True
                        self._told(self._sentence())
                await loop.sock_sendall(host, passed)
        except GuestProtocolError as error:
            log.warning("the mount of %s ends: %s", self.mount.source, error)
        except OSError as error:
            log.info("the mount of %s ends: %s", self.mount.source, error)
        finally:
            for end in (guest, host):
                _hang_up(end)

    async def _down(self, host: socket.socket, guest: socket.socket) -> None:
        """Passes on the server's answers, message by message, between which others may be put."""
        messages, loop = Messages(MOUNT_MESSAGE + _BEYOND), asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(host, _PIECE):
                for message in messages.receive(data):
                    async with self._answers:
                        await loop.sock_sendall(guest, message)
        except (OSError, GuestProtocolError) as error:
            log.info("the mount of %s ends: %s", self.mount.source, error)
        finally:
            for end in (guest, host):
                _hang_up(end)

    def _sentence(self) -> str:
        mount = self.mount
        bounds = []
        if mount.written:
            bounds.append(f"{mount.written >> 20} MiB written")
        if mount.files:
            bounds.append(f"{mount.files} files made")
        return (
            f"The mount on {mount.target} has reached its limit ({' or '.join(bounds)} in the kernel's "
            "whole life); write less there, or raise it in `mounts`."
        )


def _hang_up(end: socket.socket) -> None:
    try:
        end.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # it is not connected any more
