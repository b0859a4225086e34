"""A VM's network namespace, from outside: its holder (holder.py), its uplink, and what they are asked for.

All of it is started here and ends here. Where this process is killed it ends by itself: the holder when its
socket closes, and with it, the first process of its PID namespace, all that it has started; the uplink when a
pipe does; the namespace with both.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from sandbox_kernel.errors import NetworkError
from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.network.addresses import UPLINK, V4
from sandbox_kernel.network.outset import Outset, Part, set_out, start

_PATIENCE = 15.0
_MOST = 65536
_WORDS = 500


class Namespace:
    """One VM's namespace; `open` it once, `aclose` it always."""

    def __init__(self, cgroup: Cgroup, host_loopback: bool, outset: Outset | None = None) -> None:
        """Nothing, or what has been begun.

        Args:
            cgroup: joined by all that is started.
            host_loopback: whether the uplink has an address that stands for the host's loopback, which the
                filter then has to guard.
            outset: its holder; None to start one.
        """
        self._cgroup, self._host_loopback, self._outset = cgroup, host_loopback, outset
        self._stack = AsyncExitStack()
        self._turn = asyncio.Lock()
        self._serial = 0
        self._uplink: Part | None = None
        self.tap = -1
        """The other end of the guest's link, for QEMU."""
        self.log: socket.socket
        """Netlink's log of refused packets."""

    async def open(self, close_up: Callable[[], Awaitable[None]]) -> None:
        """Makes the namespace, with a link to the guest and a filter.

        Args:
            close_up: sees to it that nothing passes.

        Raises:
            MissingToolError: a program is missing.
            NetworkError: this host does not let us.
        """
        outset = self._outset = self._outset or set_out(self._cgroup)
        outset.taken = True
        self._stack.callback(outset.holder.end)
        self._connection = self._stack.enter_context(outset.connection)
        _, fds = await self._answer(0)
        if len(fds) != 2:
            raise NetworkError("The VM's network namespace came without its ends; look at the log.")
        self.tap = fds[0]
        self._stack.callback(self.close_tap)
        self.log = self._stack.enter_context(socket.socket(fileno=fds[1]))
        self.log.setblocking(False)
        await close_up()

    def close_tap(self) -> None:
        """Closes this end of the guest's link, when QEMU has it; idempotent."""
        if self.tap >= 0:
            os.close(self.tap)
            self.tap = -1

    async def ask(self, op: str, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
        """Has the holder do something; its answer, and descriptors that are the caller's.

        Raises:
            NetworkError: it cannot.
        """
        async with self._turn:
            self._serial += 1
            request = {"op": op, "serial": self._serial, **arguments}
            try:
                await asyncio.get_running_loop().sock_sendall(self._connection, json.dumps(request).encode())
            except OSError as error:
                raise self._gone(error) from error
            return await self._answer(self._serial)

    async def ended(self) -> str:
        """Returns when one of its parts has ended by itself: which."""
        assert self._outset is not None
        assert self._uplink is not None
        parts = {"namespace": self._outset.holder, "uplink": self._uplink}
        loop = asyncio.get_running_loop()
        ends = {name: os.pidfd_open(each.process.pid) for name, each in parts.items()}
        ended: asyncio.Future[str] = loop.create_future()

        def note(name: str) -> None:
            if not ended.done():
                ended.set_result(name)

        try:
            for name, fd in ends.items():
                loop.add_reader(fd, note, name)
            name = await ended
        finally:
            for fd in ends.values():
                loop.remove_reader(fd)
                os.close(fd)
        return f"the {name}'s process ended with status {parts[name].process.poll()}"

    async def aclose(self) -> None:
        """Ends all of it; idempotent."""
        await self._stack.aclose()

    async def open_uplink(self) -> None:
        """Joins what is open to the host's sockets.

        Raises:
            NetworkError: the uplink does not come up.
        """
        assert self._outset is not None
        program, pid = self._outset.tools["slirp4netns"], self._outset.holder.process.pid
        ready, tell = os.pipe2(os.O_CLOEXEC)
        alive, hold = os.pipe2(os.O_CLOEXEC)
        self._stack.callback(os.close, hold)
        try:
            words = [program, "--configure", "--mtu=1500", f"--cidr={V4.uplink}", "--enable-ipv6"]
            words += ["--enable-sandbox", "--enable-seccomp", f"--ready-fd={tell}", f"--exit-fd={alive}"]
            if not self._host_loopback:
                words.append("--disable-host-loopback")
            self._uplink = start([*words, str(pid), UPLINK], (tell, alive), self._cgroup)
            self._stack.callback(self._uplink.end)
        finally:
            os.close(tell)
            os.close(alive)
        try:
            await _readable(ready)
            if not os.read(ready, 1):
                raise NetworkError(f"The VM's uplink did not come up ({self._uplink.last_words()}).")
        finally:
            os.close(ready)
        await self.ask("uplink")

    async def _answer(self, serial: int) -> tuple[dict[str, Any], list[int]]:
        """The answer to one request; those to any before are of no interest, as whoever asked has gone."""
        while True:
            await _readable(self._connection.fileno())
            try:
                text, fds, _, _ = socket.recv_fds(self._connection, _MOST, 4)
            except OSError as error:
                raise self._gone(error) from error
            for fd in fds:
                os.set_inheritable(fd, False)
            if not text:
                raise self._gone(None)
            answer = json.loads(text)
            if answer.get("serial", 0) == serial:
                break
            for fd in fds:
                os.close(fd)
        if not answer.get("ok"):
            raise NetworkError(
                f"The VM's network cannot be had on this host ({str(answer.get('message'))[:_WORDS]}); run "
                "`sandbox-kernel doctor` and look at namespaces, /dev/net/tun and nftables."
            )
        return answer, fds

    def _gone(self, error: OSError | None) -> NetworkError:
        assert self._outset is not None
        reason = self._outset.holder.last_words() or error or "no reason given"
        return NetworkError(
            f"The VM's network namespace has ended ({reason}); "
            "run `sandbox-kernel doctor` and look at namespaces, /dev/net/tun and nftables."
        )


async def _readable(fd: int) -> None:
    """Returns when there is something to read.

    Raises:
        NetworkError: nothing comes.
    """
    loop = asyncio.get_running_loop()
    came: asyncio.Future[None] = loop.create_future()
    settle: Callable[[], None] = lambda: None if came.done() else came.set_result(None)  # noqa: E731
    loop.add_reader(fd, settle)
    try:
        async with asyncio.timeout(_PATIENCE):
            await came
    except TimeoutError as error:
        raise NetworkError(
            f"The VM's network did not come up within {_PATIENCE:g} s; try again when the host is less busy."
        ) from error
    finally:
        loop.remove_reader(fd)
