"""The host's end of the guest's agent: one request at a time on one vsock stream.

What comes back was written by a guest that may be hostile. Frames are bounded by the protocol; answers.py
checks every field before it becomes part of a frozen result, and cleans every text before it can reach an
error message or a log. What breaks a rule is a `GuestProtocolError`; a refusal that follows the rules is a
`GuestError` with the agent's sentence; no answer in time is a `TimeoutError`.

Rules. Calls on one client wait for each other. A call that did not end with an answer (cancelled, timed out,
broken) has closed the connection: what would still come could be taken for the next call's answer.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from sandbox_kernel.agent import answers
from sandbox_kernel.agent.answers import ExecResult, Hello, KernelExit, Started, Status
from sandbox_kernel.agent.protocol import (
    HEADER,
    MAX_PAYLOAD,
    FrameError,
    pack,
    parse_header,
    parse_message,
)
from sandbox_kernel.errors import GuestError, GuestProtocolError

__all__ = ["AgentClient", "Configuration", "ExecResult", "Hello", "KernelExit", "Started", "Status"]

CALL_TIMEOUT = 15.0
"""Seconds for an answer; emulated guests under load have been seen to take 2."""
_REHEARSAL_TIMEOUT = 60.0
"""Seconds for a rehearsal, which is a kernel's first requests one after the other."""
_EXCHANGES = 5
_MOST_EXCHANGES = 40
_FAST_UNDER_LOAD = 50_000_000
"""Nanoseconds of an exchange by which a clock is set well enough when none of `_EXCHANGES` was faster."""
_FAST_ENOUGH = 5_000_000
"""Nanoseconds of an exchange by which a clock is set well."""
_CLOSED = "The connection to the VM's agent is closed."
_CARRIES_PAYLOAD = frozenset({"exec", "read", "stacks"})


@dataclass(frozen=True)
class Configuration:
    """What a guest cannot know by itself.

    Attributes:
        clock: nanoseconds since the epoch.
        hostname: its name.
        entropy: at most `protocol.MAX_ENTROPY` bytes, credited to its random generator.
        pids: processes and threads that the kernel may have.
        reserve: bytes of available RAM that the kernel may not have; the agent's own choice when None.
        scratch: whether there is a scratch disk to be used for what the kernel writes.
        network: addresses for the network device, as protocol.py has them; None where there is none.
    """

    clock: int
    hostname: str
    entropy: bytes
    pids: int
    reserve: int | None = None
    scratch: bool = False
    network: Mapping[str, object] | None = None

    def fields(self) -> dict[str, object]:
        """What goes into a request; the entropy is its payload."""
        found: dict[str, object] = {"clock": self.clock, "hostname": self.hostname, "pids": self.pids}
        if self.scratch:
            found["scratch"] = True
        if self.network is not None:
            found["network"] = self.network
        return found if self.reserve is None else found | {"reserve": self.reserve}


class AgentClient:
    """One connection to the agent."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes over a connected, non-blocking socket."""
        self._socket = connection
        self._turn = asyncio.Lock()
        self._broken = False

    @property
    def usable(self) -> bool:
        """Whether further calls can be made."""
        return not self._broken

    async def call(
        self, op: str, payload: bytes = b"", timeout: float | None = CALL_TIMEOUT, **fields: object
    ) -> tuple[dict[str, object], bytes]:
        """Sends a request and returns the answer's object and payload.

        Args:
            op: one of `protocol.OPERATIONS`.
            payload: bytes that go with it.
            timeout: seconds until the answer must be there, once it is this call's turn; None waits for ever.
            fields: the request's fields.

        Raises:
            GuestError: the agent refused, with its sentence, or is gone, or the request is too large for it.
            KernelStartError: it refused since the kernel's command cannot be executed.
            GuestProtocolError: what came is not an answer.
            TimeoutError: no answer in time.
        """
        return await self._call(op, fields, payload, timeout)

    async def hello(self) -> Hello:
        """Asks who is there."""
        answer, _ = await self.call("hello")
        return answers.hello(answer)

    async def configure(self, configuration: Configuration) -> None:
        """Gives the guest what it cannot know by itself, apart from `start`."""
        await self._call("configure", configuration.fields(), configuration.entropy)

    async def synchronise(self) -> float:
        """Sets the guest's wall clock to the host's.

        A request can take long, so the clock is not told the time but how far to step, found in the fastest
        of a few exchanges (as in RFC 5905, section 8); of more than a few when the host is busy.

        Returns:
            Seconds that it may still be off.
        """
        best: tuple[int, int] | None = None
        for number in range(1, _MOST_EXCHANGES + 1):
            sent = time.time_ns()
            answer, _ = await self.call("configure")
            took = time.time_ns() - sent
            offset = sent + took // 2 - answers.clock(answer)
            best = min(best or (took, offset), (took, offset))
            if took < _FAST_ENOUGH or (number >= _EXCHANGES and best[0] < _FAST_UNDER_LOAD):
                break
        assert best is not None
        await self.call("configure", step=best[1])
        return best[0] / 2e9

    async def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        connection: Mapping[str, object],
        cwd: str | None = None,
        configuration: Configuration | None = None,
        mounts: Sequence[str] = (),
        volumes: Sequence[Mapping[str, object]] = (),
    ) -> Started:
        """Starts the kernel; its channels may be connected from now on.

        Args:
            argv: its command; `{connection_file}` is filled in.
            env: added to the environment that the guest gives it.
            connection: what its connection file has beside the endpoints: key and signature scheme.
            cwd: folder of the guest; the home of the kernel's user when None.
            configuration: of the guest, in force before the kernel is; None when it has one.
            mounts: targets of mounts that have been asked for, which are there before the kernel is.
            volumes: as the protocol has them, likewise.

        Raises:
            KernelStartError: the command cannot be executed.
            MountError: one of the mounts cannot be made; VolumeError: a volume cannot be mounted.
        """
        order: dict[str, object] = {"argv": list(argv), "env": dict(env), "connection": dict(connection)}
        if cwd is not None:
            order["cwd"] = cwd
        if mounts:
            order["mounts"] = list(mounts)
        if volumes:
            order["volumes"] = list(volumes)
        if configuration is not None:
            order["configuration"] = configuration.fields()
        entropy = configuration.entropy if configuration is not None else b""
        answer, _ = await self._call("start", order, entropy)
        return answers.started(answer)

    async def freeze(self, timeout: float) -> None:
        """Has the guest's volumes written out, and nothing more written to them, for good.

        Args:
            timeout: seconds that it may take.
        """
        await self._call("freeze", {}, timeout=timeout)

    async def await_mounted(self, target: str) -> None:
        """Waits until a mount that has been asked for is there.

        Raises:
            MountError: it cannot be made.
        """
        await self.call("mounted", target=target)

    async def unmount(self, target: str) -> None:
        """Takes a mount away."""
        await self.call("unmount", target=target)

    async def rehearse(self, configuration: Configuration) -> None:
        """Has the kernel that stands by rehearse its start, so that the start itself is fast.

        Raises:
            GuestError: no kernel stands by, or none any more.
        """
        fields = {"configuration": configuration.fields()}
        await self._call("rehearse", fields, configuration.entropy, _REHEARSAL_TIMEOUT)

    async def wait(self) -> KernelExit:
        """Waits until the kernel has ended, however long that takes."""
        answer, _ = await self.call("wait", timeout=None)
        return answers.kernel_exit(answer)

    async def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group (0 only asks); False when the kernel has ended."""
        answer, _ = await self.call("signal", number=number)
        return answers.signalled(answer)

    async def stacks(self) -> str:
        """What each thread of the kernel is doing, as lines; empty when it cannot be had."""
        _, output = await self.call("stacks")
        return answers.stacks(output)

    async def status(self) -> Status:
        """How the kernel fares."""
        answer, _ = await self.call("status")
        return answers.status(answer)

    async def exec(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        root: bool = False,
        cwd: str | None = None,
    ) -> ExecResult:
        """Runs a program in the guest, by default as the kernel's user and within the kernel's limits.

        Args:
            argv: the command.
            env: added to the environment that the guest gives it.
            timeout: seconds until its process group is killed, at most `protocol.MAX_EXEC_SECONDS`.
            root: as root, outside the kernel's limits.
            cwd: folder; home when None.

        Raises:
            GuestError: it cannot be executed.
        """
        order = {"argv": list(argv), "env": dict(env or {}), "root": root, "seconds": timeout}
        answer, output = await self._call(
            "exec", order if cwd is None else order | {"cwd": cwd}, timeout=timeout + CALL_TIMEOUT
        )
        return answers.exec_result(answer, output)

    async def read(self, path: str, offset: int = 0, length: int = MAX_PAYLOAD) -> bytes:
        """Up to `length` bytes of a regular file, from `offset`, as the kernel's user may read it."""
        _, data = await self.call("read", path=path, offset=offset, length=length)
        if len(data) > length:
            raise GuestProtocolError("The VM's agent sent more of a file than was asked for.")
        return data

    async def write(self, path: str, data: bytes, offset: int = 0, mode: int = 0o644) -> int:
        """Writes a regular file as the kernel's user (cut first at offset 0); returns its size in bytes."""
        answer, _ = await self.call("write", data, path=path, offset=offset, mode=mode)
        return answers.written(answer)

    async def connect(self, port: int) -> socket.socket:
        """Makes this connection one to a port of the guest's loopback, and gives it away.

        Returns:
            The connected, non-blocking socket, the caller's to close. No further calls can be made here.

        Raises:
            GuestError: nobody listens there, or nobody accepts.
        """
        await self.call("connect", port=port)
        self._broken = True
        given = socket.socket(self._socket.family, self._socket.type, fileno=self._socket.detach())
        given.setblocking(False)
        return given

    async def pull(self, path: str) -> socket.socket:
        """Has the agent send a file or directory of the guest, as the kernel's user may read it.

        Returns:
            This connection, the caller's now and no client's any more: a tree comes over it (tree/).
        """
        await self.call("pull", path=path)
        return self._release()

    async def push(self, path: str, name: str) -> socket.socket:
        """Has the agent receive a file or directory, as the kernel's user may write it.

        Args:
            path: where it goes.
            name: what it is called where `path` is a directory; nothing for what is in it.

        Returns:
            As `pull`; a tree is to be sent over it, which is then answered (`answers.copied`).
        """
        await self._call("push", {"path": path, "name": name} if name else {"path": path})
        return self._release()

    def _release(self) -> socket.socket:
        self._broken = True
        return self._socket

    async def shutdown(self) -> None:
        """Has the guest end itself, and closes this connection, for which the guest waits."""
        await self.call("shutdown")
        await self.aclose()

    async def aclose(self) -> None:
        """Closes the connection; a call that waits fails with GuestError. Idempotent."""
        self._broken = True
        if self._turn.locked():
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the call, which then closes
        else:
            self._socket.close()

    async def _call(
        self,
        op: str,
        fields: Mapping[str, object],
        payload: bytes = b"",
        timeout: float | None = CALL_TIMEOUT,
    ) -> tuple[dict[str, object], bytes]:
        try:
            request = pack({"op": op, **fields}, payload)
        except FrameError as error:
            raise GuestError(f"A request ({op}) is too large for the VM's agent: {error}") from error
        async with self._turn:
            answer, output = await self._exchange(request, timeout)
        if output and op not in _CARRIES_PAYLOAD:
            await self.aclose()
            raise GuestProtocolError(f"The VM's agent sent {len(output)} bytes that nobody asked for.")
        return answers.accepted(answer), output

    async def _exchange(self, request: bytes, timeout: float | None) -> tuple[dict[str, object], bytes]:
        if self._broken:
            raise GuestError(_CLOSED)
        complete = False
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_sendall(self._socket, request)
                json_length, payload_length = parse_header(await self._exactly(HEADER.size))
                answer = parse_message(await self._exactly(json_length))
                output = await self._exactly(payload_length)
            complete = True
            return answer, output
        except FrameError as error:
            raise GuestProtocolError(f"The VM's agent broke its protocol: {error}") from error
        except TimeoutError:
            raise
        except OSError as error:
            raise GuestError(f"The connection to the VM's agent broke ({error}).") from error
        finally:
            if not complete or self._broken:
                self._broken = True
                self._socket.close()

    async def _exactly(self, count: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < count:
            piece = await loop.sock_recv(self._socket, min(count - len(data), 1 << 18))
            if not piece:
                raise ConnectionResetError("the agent closed it")
            data += piece
        return bytes(data)
