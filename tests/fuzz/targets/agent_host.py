"""Fuzz target: what the agent answers, as the host reads it: frames, JSON, every function of `answers.py`.

A script's first string is the fate of the run: where pieces end, what breaks. The rest calls the methods of a
real `AgentClient` one after the other, and writes what each gets back: bytes of any kind, or a frame with an
honest or forged header around an object of the names that answers have, with values of every type. There is
no event loop: `Wire` gives its coroutines what they wait for at once.

Only `GuestError` (and so `GuestProtocolError`, `KernelStartError`) and `TimeoutError` may come out, with
texts for people: one printable line of bounded length. A result is in the ranges that its class documents.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from sandbox_kernel.agent import client as client_module
from sandbox_kernel.agent.client import (
    AgentClient,
    Configuration,
    ExecResult,
    Hello,
    KernelExit,
    Started,
    Status,
)
from sandbox_kernel.agent.protocol import HEADER, MAGIC, MAX_JSON, MAX_PAYLOAD
from sandbox_kernel.errors import GuestError, GuestProtocolError
from tests.fuzz import json_text
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

CONFIGURATION = Configuration(1, "name", b"entropy", 100)
LARGEST = 2**53
FIELDS = (
    *("ok", "error", "message", "kernel", "python", "uptime", "boot", "clock", "pid", "adopted", "code"),
    *("signal", "out_of_memory", "tail", "alive", "memory_current", "memory_peak", "pids_current"),
    *("oom_kills", "load", "memory_max", "truncated", "timed_out", "size"),
)
PIECE = 1 << 18


class Wire:
    """The connection, and as much of an event loop as the client uses."""

    def __init__(self, script: Script) -> None:
        self._fate = Script(script.string())
        self._script = script
        self._bytes = b""
        self._at = 0
        self.closed = False
        self.call = 0
        """Which of `CALLS` asks."""

    def close(self) -> None:
        self.closed = True

    def shutdown(self, how: int) -> None:
        raise AssertionError("no call waits when another one closes")

    def cancelling(self) -> int:
        return 0

    async def sock_sendall(self, sock: Wire, data: bytes) -> None:
        assert sock is self and not self.closed
        self._bytes, self._at = answer(self._script, self.call), 0

    @property
    def payload(self) -> int:
        """Bytes of payload in what was answered last."""
        return int(HEADER.unpack_from(self._bytes)[3])

    async def sock_recv(self, sock: Wire, count: int) -> bytes:
        assert sock is self and not self.closed and 0 < count <= PIECE
        piece = self._bytes[self._at : self._at + min(count, self._fate.number() or count)]
        self._at += len(piece)
        if not piece:
            error = self._fate.choose((None, ConnectionResetError, TimeoutError, OSError))
            if error is not None:
                raise error("it broke")
        return piece


class Timeout:
    """`asyncio.timeout` without a clock."""

    def __init__(self, seconds: float | None) -> None:
        assert seconds is None or seconds > 0

    async def __aenter__(self) -> None:
        pass

    async def __aexit__(self, *error: object) -> None:
        pass


def answer(script: Script, call: int) -> bytes:
    """What comes back for one request."""
    kind = script.below(5)
    if kind == 0:
        return script.string()
    if kind == 1:
        body = script.string()
    elif kind == 2:
        body = json_text.an_object(script, FIELDS)
    else:
        body = json_text.nearly(script, FIELDS, GOOD[call] if kind == 3 else script.choose(GOOD))
    payload = script.string() if kind != 2 else b""
    lengths = [len(body), len(payload)]
    forged = script.below(8)
    if forged in (6, 7):
        lengths[forged - 6] = script.number() % (1 << 32)
    magic, version = (b"SKB", 1) if forged == 5 else (MAGIC, script.number() if forged == 4 else 1)
    return HEADER.pack(magic, version % 256, *lengths) + body + payload


def text(value: str, limit: int) -> None:
    assert isinstance(value, str) and len(value) <= limit and value.isprintable(), value


def whole(value: int, low: int = 0, high: int = LARGEST) -> None:
    assert type(value) is int and low <= value <= high, value


def real(value: float) -> None:
    assert type(value) is float and 0 <= value <= LARGEST and math.isfinite(value), value


def flag(value: bool) -> None:
    assert type(value) is bool, value


def hello(result: Hello) -> None:
    text(result.kernel, 80)
    text(result.python, 80)
    real(result.uptime)
    assert len(result.boot) <= 16
    for name, when in result.boot:
        text(name, 80)
        real(when)


def started(result: Started) -> None:
    whole(result.pid, 1, 1 << 22)
    flag(result.adopted)
    whole(result.clock, 0, 2**63 - 1)


def ended(result: KernelExit) -> None:
    assert (result.code is None) != (result.signal is None)
    whole(result.status, 0, 255)
    flag(result.out_of_memory)
    flag(result.deliberate)
    text(result.how(), 80)
    text(result.tail, 2000)


def status(result: Status) -> None:
    flag(result.alive)
    for name in ("memory_current", "memory_peak", "pids_current", "oom_kills", "memory_max"):
        whole(getattr(result, name))
    real(result.load)
    real(result.uptime)
    json.dumps(result.to_dict())


def executed(result: ExecResult) -> None:
    whole(result.code, -64, 255)
    assert len(result.output) <= MAX_PAYLOAD
    flag(result.truncated)
    flag(result.timed_out)


def content(result: bytes) -> None:
    assert len(result) <= 10


def seconds(result: float) -> None:
    assert isinstance(result, float)


def nothing(result: None) -> None:
    assert result is None


Check = Callable[[Any], None]
Call = Callable[[AgentClient], Coroutine[None, None, Any]]

CALLS: tuple[tuple[Call, Check], ...] = (
    (lambda client: client.hello(), hello),
    (lambda client: client.configure(CONFIGURATION), nothing),
    (lambda client: client.synchronise(), seconds),
    (lambda client: client.start(["a"], {}, {"key": "k"}, "/", CONFIGURATION), started),
    (lambda client: client.rehearse(CONFIGURATION), nothing),
    (lambda client: client.wait(), ended),
    (lambda client: client.signal(2), flag),
    (lambda client: client.status(), status),
    (lambda client: client.exec(["a"]), executed),
    (lambda client: client.read("a", 0, 10), content),
    (lambda client: client.write("a", b"bc"), whole),
    (lambda client: client.shutdown(), nothing),
)
HELLO, CONFIGURE, SYNCHRONISE, START, REHEARSE, WAIT, SIGNAL, STATUS, EXEC, READ, WRITE, SHUTDOWN = range(12)

_NUMBERS = dict.fromkeys(("memory_current", "memory_peak", "pids_current", "oom_kills", "memory_max"), 7)
GOOD: tuple[dict[str, object], ...] = tuple(
    {"ok": True, **fields}
    for fields in (
        {"kernel": "6.12", "python": "3.13", "uptime": 1.5, "boot": {"python": 1, "agent": 2.5}},
        {"clock": 5},
        {"clock": 6},
        {"pid": 12, "adopted": True, "clock": 7},
        {},
        {"code": 3, "signal": None, "out_of_memory": False, "tail": "last words"},
        {"alive": True},
        {"alive": True, "load": 0.5, "uptime": 3, **_NUMBERS},
        {"code": -9, "truncated": False, "timed_out": True},
        {"size": 3},
        {"size": 2},
        {},
    )
)
"""A good answer to each of `CALLS`."""


def finished(coroutine: Coroutine[None, None, Any]) -> Any:
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a call waits for nothing")


def _run(data: bytes) -> None:
    script = Script(data)
    wire = Wire(script)
    asyncio._set_running_loop(wire)  # type: ignore[arg-type]
    try:
        client = AgentClient(wire)  # type: ignore[arg-type]
        for _ in range(8):
            wire.call = script.below(len(CALLS))
            call, check = CALLS[wire.call]
            broken = client._broken
            try:
                check(finished(call(client)))
                assert not broken, "a call succeeds on a connection that is over"
                assert wire.call in (EXEC, READ) or not wire.payload
            except GuestError as error:
                text(str(error), 3000)
                if broken or wire.closed:
                    assert client._broken and wire.closed
                    assert not broken or not isinstance(error, GuestProtocolError)
            except TimeoutError:
                assert client._broken and wire.closed
            if not script.more():
                break
        finished(client.aclose())
        assert wire.closed
    finally:
        asyncio._set_running_loop(None)


class _Asyncio:
    """asyncio, as the client uses it, without clocks."""

    Lock = asyncio.Lock
    timeout = Timeout
    get_running_loop = staticmethod(asyncio.get_running_loop)


@contextmanager
def fuzzing() -> Iterator[Run]:
    client_module.asyncio = _Asyncio  # type: ignore[attr-defined]
    try:
        yield _run
    finally:
        client_module.asyncio = asyncio  # type: ignore[attr-defined]


def seeds() -> Iterator[bytes]:
    def said(call: int, fields: dict[str, object], payload: bytes = b"") -> bytes:
        return write(call, 1, json.dumps(fields).encode(), payload, 0)

    def alone(call: int, fields: dict[str, object], payload: bytes = b"") -> bytes:
        return write(b"") + said(call, fields, payload)

    good: list[tuple[int, dict[str, object], bytes]] = [
        (
            HELLO,
            {"kernel": "6.12", "python": "3.13", "uptime": 1.5, "boot": {"python": 1, "agent": 2.5}},
            b"",
        ),
        (CONFIGURE, {"clock": 5}, b""),
        (START, {"pid": 12, "adopted": True, "clock": 7}, b""),
        (REHEARSE, {}, b""),
        (WAIT, {"code": 3, "signal": None, "out_of_memory": False, "tail": "last\nwords"}, b""),
        (WAIT, {"code": None, "signal": 9, "out_of_memory": True, "tail": ""}, b""),
        (WAIT, {"code": None, "signal": 40, "out_of_memory": False, "tail": "\u202e"}, b""),
        (WAIT, {"code": None, "signal": 15, "out_of_memory": False, "tail": "a" * 2100}, b""),
        (SIGNAL, {"alive": True}, b""),
        (STATUS, {"alive": True, "load": 0.5, "uptime": 3, **_NUMBERS}, b""),
        (EXEC, {"code": -9, "truncated": False, "timed_out": True}, b"output"),
        (READ, {"size": 3}, b"abc"),
        (READ, {"size": 3}, b"too much for it"),
        (WRITE, {"size": 2}, b""),
        (SHUTDOWN, {}, b""),
    ]
    for call, fields, payload in good:
        yield alone(call, {"ok": True, **fields}, payload)
        yield alone(call, {"ok": False, "error": "start", "message": "No.\x1b[1m"})
        yield alone(call, {"ok": False, "message": ""})
        for name, value in fields.items():
            yield alone(call, {"ok": True, **fields, name: None}, payload)
            for number in (-1, 256, 65, (1 << 22) + 1, 2**53 + 1, 2**63, 1e300):
                yield alone(call, {"ok": True, **fields, name: number}, payload)
            yield alone(call, {"ok": True, **fields, name: float("nan")}, payload)
            yield alone(call, {"ok": True, **fields, name: [value]}, payload)
            if isinstance(value, str):
                yield alone(call, {"ok": True, **fields, name: "\ud800\n\u202eX" * 50}, payload)
    yield write(b"") + b"".join(
        said(call, {"ok": True, **fields}, payload) for call, fields, payload in good[:8]
    )
    yield alone(SYNCHRONISE, {"ok": True, "clock": 5}) + write(1, b'{"ok":true}', b"", 0)
    yield alone(HELLO, {"ok": True}, b"nobody wanted it") + said(HELLO, {"ok": True})
    for body in (b"[" * 2000, b"[]", b"{", b"\xff\xfe", b"1" * 5000, b'{"ok":1e999}', b"\x00\x7b\x00\x7d"):
        yield write(b"", HELLO, 1, body, b"", 0)
    for forged in (4, 5, 6, 7):
        yield write(b"", HELLO, 1, b"{}", b"", forged, 2)
    yield write(b"", HELLO, 1, b"{}", b"", 6, MAX_JSON + 1)
    yield write(b"", HELLO, 1, b"{}", b"", 7, MAX_PAYLOAD)
    for call in range(len(CALLS)):
        yield write(b"") + write(call, 3, 0, b"", 0) * 2
        for field in range(4):
            for kind in range(json_text.KINDS):
                yield write(b"", call, 3, 1, 1, field, kind, 3, 5, b"", 0)
    for cut in range(5):
        yield write(write(5, 3, cut, 1, 0, cut), HELLO, 1, b'{"ok":true}', b"", 0)
        yield write(write(0, 0, 0, 0, cut), HELLO, 1, b'{"ok":true}', b"", 0, STATUS, 0, b"SKA", 0)
    for name in range(len(FIELDS)):
        for kind in range(json_text.KINDS):
            yield write(b"", HELLO, 2, 3, 0, 1, name, kind, 3, 5, name, kind, 4, 0)
