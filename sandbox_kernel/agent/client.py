"""The host's client of the guest's agent: one request at a time on one vsock stream.

What comes back was written by a guest that may be hostile. Frames are bounded by the protocol, every field is
checked for type and range before it becomes part of a frozen result, and text is stripped of control
characters and shortened before it can reach an error message or a log. What breaks a rule is a
`GuestProtocolError`; a refusal that follows the rules is a `GuestError` with the agent's sentence.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from sandbox_kernel.agent.protocol import (
    HEADER,
    MAX_PAYLOAD,
    FrameError,
    pack,
    parse_header,
    parse_message,
)
from sandbox_kernel.errors import GuestError, GuestProtocolError, KernelStartError

CALL_TIMEOUT = 15.0
"""Seconds for an answer; emulated guests under load have been seen to take 2."""
_TEXT = 2000
_T = TypeVar("_T")


@dataclass(frozen=True)
class Hello:
    """Who answers: kernel release and Python version of the guest, seconds since its boot."""

    kernel: str
    python: str
    uptime: float


@dataclass(frozen=True)
class Status:
    """How the kernel fares: bytes of memory in its cgroup, its processes, kills for want of memory."""

    alive: bool
    memory_current: int
    memory_peak: int
    pids_current: int
    oom_kills: int
    load: float

    def to_dict(self) -> dict[str, Any]:
        """This status as JSON's types."""
        return asdict(self)


@dataclass(frozen=True)
class KernelExit:
    """How the kernel's process ended.

    Attributes:
        code: exit status; None when it was killed by a signal.
        signal: that signal; None otherwise.
        out_of_memory: whether the guest's kernel killed a process of the kernel's cgroup for want of memory.
        tail: the last text on its standard output and error.
    """

    code: int | None
    signal: int | None
    out_of_memory: bool
    tail: str

    @property
    def status(self) -> int:
        """The exit status as a shell would show it."""
        return self.code if self.code is not None else 128 + (self.signal or 0)

    def how(self) -> str:
        """How it ended, as the second half of a sentence."""
        if self.code is not None:
            return f"ended with status {self.code}"
        return f"was killed by signal {self.signal}"


@dataclass(frozen=True)
class ExecResult:
    """A program's exit code (negative: signal), its output, and whether output or time ran out."""

    code: int
    output: bytes
    truncated: bool
    timed_out: bool


class AgentClient:
    """One connection to the agent."""

    def __init__(self, connection: socket.socket) -> None:
        """Takes over a connected, non-blocking socket."""
        self._socket = connection
        self._turn = asyncio.Lock()
        self._broken = False

    async def call(
        self, op: str, payload: bytes = b"", timeout: float | None = CALL_TIMEOUT, **fields: object
    ) -> tuple[dict[str, object], bytes]:
        """Sends a request and returns the answer's object and payload.

        Calls wait for each other. One that is cancelled or times out closes the connection: its answer
        could otherwise be taken for the next call's.

        Args:
            op: one of `protocol.OPERATIONS`.
            payload: bytes that go with it.
            timeout: seconds until the answer must be there; None waits for ever.
            fields: the request's fields.

        Raises:
            GuestError: the agent refused, with its sentence, or is gone.
            GuestProtocolError: what came is not an answer.
            TimeoutError: no answer in time.
        """
        request = pack({"op": op, **fields}, payload)
        async with self._turn:
            if self._broken:
                raise GuestError("The connection to the VM's agent is closed.")
            self._broken = True
            try:
                async with asyncio.timeout(timeout):
                    await asyncio.get_running_loop().sock_sendall(self._socket, request)
                    json_length, payload_length = parse_header(await self._exactly(HEADER.size))
                    answer = parse_message(await self._exactly(json_length))
                    output = await self._exactly(payload_length)
            except FrameError as error:
                raise GuestProtocolError(f"The VM's agent broke its protocol: {error}") from error
            except OSError as error:
                if isinstance(error, TimeoutError):
                    raise
                raise GuestError(f"The connection to the VM's agent broke ({error}).") from error
            self._broken = False
        if answer.get("ok") is True:
            return answer, output
        kind = KernelStartError if answer.get("error") == "start" else GuestError
        raise kind(_plain(_field(answer, "message", str)))

    async def hello(self) -> Hello:
        """Asks who is there."""
        answer, _ = await self.call("hello")
        return Hello(
            _plain(_field(answer, "kernel", str))[:80],
            _plain(_field(answer, "python", str))[:80],
            _field(answer, "uptime", float),
        )

    async def configure(self, clock: int, hostname: str, entropy: bytes, pids: int) -> None:
        """Gives the guest what it cannot know by itself.

        Args:
            clock: nanoseconds since the epoch.
            hostname: its name.
            entropy: bytes credited to its random generator.
            pids: processes and threads that the kernel may have.
        """
        await self.call("configure", entropy, clock=clock, hostname=hostname, pids=pids)

    async def start(
        self, argv: Sequence[str], env: Mapping[str, str], connection: Mapping[str, object]
    ) -> int:
        """Starts the kernel and returns its PID in the guest; its channels may be connected from now on.

        Raises:
            KernelStartError: the command cannot be executed.
        """
        answer, _ = await self.call("start", argv=list(argv), env=dict(env), connection=dict(connection))
        return _field(answer, "pid", int)

    async def wait(self) -> KernelExit:
        """Waits until the kernel has ended, however long that takes."""
        answer, _ = await self.call("wait", timeout=None)
        code, number = answer.get("code"), answer.get("signal")
        for value in (code, number):
            if value is not None and not (isinstance(value, int) and 0 <= value <= 255):
                raise GuestProtocolError("The VM's agent reports an exit status that is none.")
        return KernelExit(
            code if isinstance(code, int) else None,
            number if isinstance(number, int) else None,
            _field(answer, "out_of_memory", bool),
            _plain(_field(answer, "tail", str)),
        )

    async def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group; False when the kernel has ended."""
        answer, _ = await self.call("signal", number=number)
        return _field(answer, "alive", bool)

    async def status(self) -> Status:
        """How the kernel fares."""
        answer, _ = await self.call("status")
        return Status(
            _field(answer, "alive", bool),
            _field(answer, "memory_current", int),
            _field(answer, "memory_peak", int),
            _field(answer, "pids_current", int),
            _field(answer, "oom_kills", int),
            _field(answer, "load", float),
        )

    async def exec(
        self,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        timeout: float = 30.0,
        root: bool = False,
    ) -> ExecResult:
        """Runs a program in the guest, by default as the kernel's user, for at most `timeout` seconds."""
        answer, output = await self.call(
            "exec",
            timeout=timeout + CALL_TIMEOUT,
            argv=list(argv),
            env=dict(env or {}),
            root=root,
            seconds=timeout,
        )
        return ExecResult(
            _field(answer, "code", int, minimum=-64),
            output,
            _field(answer, "truncated", bool),
            _field(answer, "timed_out", bool),
        )

    async def read(self, path: str, offset: int = 0, length: int = MAX_PAYLOAD) -> bytes:
        """Up to `length` bytes of a regular file, from `offset`, as the kernel's user may read it."""
        _, data = await self.call("read", path=path, offset=offset, length=length)
        if len(data) > length:
            raise GuestProtocolError("The VM's agent sent more of a file than was asked for.")
        return data

    async def write(self, path: str, data: bytes, offset: int = 0, mode: int = 0o644) -> int:
        """Writes a regular file as the kernel's user (truncated at offset 0); returns its size in bytes."""
        answer, _ = await self.call("write", data, path=path, offset=offset, mode=mode)
        return _field(answer, "size", int)

    async def shutdown(self) -> None:
        """Has the guest end itself."""
        await self.call("shutdown")

    async def aclose(self) -> None:
        """Closes the connection; idempotent."""
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


def _field(answer: Mapping[str, object], name: str, kind: type[_T], minimum: int = 0) -> _T:
    """A field of an answer with the right type, numbers within what anything real can reach."""
    value: Any = answer.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if good and kind in (int, float):
        good = minimum <= value <= 2**53
    if not good:
        raise GuestProtocolError(f"The VM's agent sent no usable {name!r}.")
    return value  # type: ignore[no-any-return]


def _plain(text: str) -> str:
    """A guest's text on one line, printable, bounded."""
    return " ".join("".join(c if c.isprintable() else " " for c in text[-_TEXT:]).split())
