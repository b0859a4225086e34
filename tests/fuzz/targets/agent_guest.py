"""Fuzz target: the agent in the guest: framing, the checks of requests, the answers.

A script's first string is the fate of the run: where pieces end, what breaks, what the guest refuses. The
rest is what comes over one connection: bytes of any kind, and frames with honest or forged headers around
requests whose fields have the names that operations know, with values of every type. `Server.serve` reads
it and the real `Operations` perform it, on a guest that does nothing: no clock is set, no file touched, no
process started (`NOTHING`). What stands there instead checks what it is given as Linux would, and fails when
fate has it so.

Nothing may come out of `serve`, whatever comes in: what does ends an agent's thread and takes a connection's
place for ever. Each request that is a frame has one answer, which the host could read.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import configuration
import network
import operations
import server
import volumes
from agent_protocol import (
    HEADER,
    MAGIC,
    MAX_ENTROPY,
    MAX_JSON,
    MAX_PAYLOAD,
    MAX_VOLUMES,
    OPERATIONS,
    STANDBY_ARGV,
    can_adopt,
    parse_header,
    parse_message,
)
from answer import Answer
from children import Plan
from command import command
from kernel_process import Order
from operations import Operations
from program import Outcome
from server import Incoming, Server
from settings import Settings
from tests.fuzz import json_text
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

SETTINGS = Settings(cgroups="", home="/home/sandbox")
NAMES = tuple(sorted(OPERATIONS))
FIELDS = (
    *("op", "clock", "step", "hostname", "pids", "reserve", "argv", "env", "cwd", "connection"),
    *("configuration", "number", "seconds", "root", "path", "offset", "length", "mode", "key", "a=b"),
    *("volumes", "serial", "read_only", "port", "network", "name"),
)
CODES = {"unknown", "malformed", "failed", "start", "started", "not started", "no standby"}
MOST = HEADER.size + MAX_JSON + MAX_PAYLOAD


class Guest:
    """What the agent's operations do to a guest, without one; fails as often as fate has it."""

    fate = Script(b"")

    def act(self, file: str = "file") -> None:
        if self.fate.below(16) == 15:
            raise OSError(errno.ENOSPC, "No space left on device", file)

    def clock_settime_ns(self, clock: int, value: int) -> None:
        assert clock == time.CLOCK_REALTIME
        if not -(2**63) <= value < 2**63:
            raise OverflowError("timestamp too large to convert to C _PyTime_t")  # as Python does
        if value < 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.act()

    def sethostname(self, name: str) -> None:
        assert "\0" not in name
        if len(os.fsencode(name)) > 64:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.act()

    def add_entropy(self, data: bytes) -> None:
        assert 0 < len(data) <= MAX_ENTROPY
        self.act()

    def new_identity(self) -> None:
        self.act()

    def limit_pids(self, settings: Settings, count: int) -> None:
        assert 16 <= count < 1 << 22
        self.act()

    def limit_memory(self, settings: Settings, reserve: int) -> None:
        assert 0 <= reserve < 1 << 63
        self.act()

    def read(self, settings: Settings, path: str, offset: int, length: int) -> tuple[bytes, int]:
        assert os.fsencode(path) and 0 <= offset < 1 << 63 and 0 <= length <= MAX_PAYLOAD
        self.act(path)
        return b"content"[:length], 7

    def write(self, settings: Settings, path: str, content: bytes, offset: int, mode: int) -> int:
        assert os.fsencode(path) and 0 <= offset < 1 << 63 and 0 <= mode <= 0o777
        self.act(path)
        return len(content)

    def attach(self, wanted: list[volumes.Volume]) -> None:
        assert len(wanted) <= MAX_VOLUMES
        for volume in wanted:
            assert b"\0" not in os.fsencode(volume.target) and 0 < len(volume.serial) <= 20
            self.act(volume.target)

    def connect(self, port: int, peer: int) -> None:
        assert type(port) is int and 1 <= port <= 65535 and peer == 99
        self.act()

    def run(self, children: object, plan: Plan, reader: int, seconds: float, limit: int) -> Outcome:
        os.close(plan.stdout)
        os.close(reader)
        executable(plan.argv, plan.env, plan.cwd)
        assert 0 < seconds <= 300
        self.act(plan.argv[0])
        return Outcome(self.fate.below(2) * -9, b"output", False, False)


class Kernel:
    """A kernel's process; its connection file is made as the real one is."""

    pid = 12
    alive = True

    def __init__(self, children: object, settings: Settings, order: Order) -> None:
        self.rename(order.connection)
        argv = command(order.argv, "/run/connection.json", settings.python, settings.launcher)
        executable(argv, order.env, order.cwd)
        GUEST.act(argv[0])

    def rename(self, connection: dict[str, object]) -> None:
        json.dumps({**connection, "transport": "ipc"}).encode()

    def wait(self, peer: int) -> dict[str, object] | None:
        return {"code": 0, "signal": None} if GUEST.fate.below(2) else None

    def stacks(self) -> bytes:
        GUEST.act()
        return b"stacks"[: GUEST.fate.below(7)]

    def signal(self, number: int) -> bool:
        assert 0 <= number <= 64
        return bool(GUEST.fate.below(2))


class Copies:
    """Copies that have ended when they begin."""

    def __init__(self, settings: Settings) -> None:
        pass

    def pull(self, path: str) -> Copies:
        assert b"\0" not in os.fsencode(path)
        GUEST.act(path)
        return self

    def push(self, path: str, name: str) -> Copies:
        assert "/" not in name and name not in (".", "..")
        return self.pull(path)

    def run(self, connection: Connection) -> None:
        GUEST.act()

    def close(self) -> None:
        pass


class Standby:
    """A template's kernel, with the real rule of what it can become."""

    def leave_home(self) -> None:
        pass

    def adopt(self, order: Order) -> Kernel | None:
        return Kernel(None, SETTINGS, order) if can_adopt(order.argv, order.env) else None

    def rehearse(self) -> bool:
        return GUEST.fate.below(4) != 3


def executable(argv: list[str], env: dict[str, str], cwd: str) -> None:
    """A system call would take it."""
    assert argv and argv[0]
    for word in (*argv, *env, *env.values(), cwd):
        assert b"\0" not in os.fsencode(word)
    assert not any("=" in name or not name for name in env)


class Connection:
    """The host's side of a connection, as a script has it."""

    def __init__(self, script: Script, fate: Script) -> None:
        self._script = script
        self._fate = fate
        self._waiting = b""
        self.sent = bytearray()
        self.closed = False
        self.broken = False

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def fileno(self) -> int:
        return 99

    def settimeout(self, seconds: float | None) -> None:
        assert seconds is None or seconds > 0

    def recv(self, count: int) -> bytes:
        assert not self.closed and 0 < count <= 1 << 18
        while not self._waiting and self._script.more():
            self._waiting = request(self._script)
        most = self._fate.number() or count
        piece, self._waiting = self._waiting[: min(count, most)], self._waiting[min(count, most) :]
        if not piece:
            error = self._fate.choose((None, ConnectionResetError, TimeoutError))
            if error is not None:
                self.broken = True
                raise error("it broke")
        return piece

    def send(self, frame: bytes, flags: int) -> int:
        assert flags == socket.MSG_DONTWAIT
        how = self._fate.below(8)
        if how == 6:
            raise BlockingIOError
        if how == 7:
            self.broken = True
            raise BrokenPipeError
        count = len(frame) if how < 5 else self._fate.below(len(frame))
        self.sent += frame[:count]
        return count

    def sendall(self, rest: memoryview) -> None:
        if self._fate.below(8) == 7:
            self.broken = True
            raise TimeoutError
        self.sent += rest


class Bounded(Incoming):
    """Looks at what is kept."""

    def _complete(self, count: int, deadline: float) -> None:
        assert count <= MOST
        super()._complete(count, deadline)
        assert len(self._data) <= max(count, server._REQUEST)


def request(script: Script) -> bytes:
    """What the host sends next."""
    kind = script.below(6)
    if kind == 0:
        return script.string()
    if kind == 1:
        body = script.string()
    elif kind == 2:
        body = json_text.an_object(script, FIELDS)
    elif kind == 3:
        op = script.choose(NAMES).encode()
        rest = json_text.an_object(script, FIELDS)[1:]
        body = b'{"op":"%s"%s%s' % (op, b"" if rest == b"}" else b",", rest)
    else:
        good = script.choose(GOOD)
        body = json_text.nearly(script, FIELDS, good)
    payload = script.string() if kind == 5 else b""
    lengths = [len(body), len(payload)]
    forged = script.below(16)
    if forged in (14, 15):
        lengths[forged - 14] = script.number() % (1 << 32)
    return HEADER.pack(b"SKB" if forged == 13 else MAGIC, 2 if forged == 12 else 1, *lengths) + body + payload


_CONFIGURED = {"clock": 5, "step": -3, "hostname": "name", "pids": 100, "reserve": 1 << 20}
_ORDER = {"argv": STANDBY_ARGV, "env": {"A": "b"}, "connection": {"key": "k"}, "cwd": "/tmp"}
GOOD: tuple[dict[str, object], ...] = (
    {"op": "hello"},
    {"op": "configure", **_CONFIGURED},
    {"op": "rehearse", "configuration": _CONFIGURED},
    {"op": "start", **_ORDER, "configuration": _CONFIGURED},
    {"op": "start", **_ORDER, "argv": ["python", "-W", "error", "-m", "ipykernel", "-f", "x"]},
    {"op": "start", **_ORDER, "argv": ["python3.13", "-c", "x"]},
    {"op": "start", **_ORDER, "argv": ["/bin/R", "{connection_file}"]},
    {"op": "wait"},
    {"op": "signal", "number": 9},
    {"op": "status"},
    {"op": "exec", "argv": ["ls", ""], "env": {}, "cwd": "/", "seconds": 1.5, "root": True},
    {"op": "exec", "argv": ["ls"]},
    {"op": "read", "path": "a", "offset": 3, "length": 5},
    {"op": "write", "path": "a", "offset": 0, "mode": 0o600},
    {"op": "shutdown"},
    {"op": "reboot"},
    {"op": "start", **_ORDER, "volumes": [{"serial": "volume-0", "target": "/data", "read_only": True}]},
    {"op": "freeze"},
    {"op": "connect", "port": 80},
    {"op": "pull", "path": "a"},
    {"op": "push", "path": "a", "name": "b"},
)
START, EXEC = 3, 11


def answers(data: bytes) -> int:
    """How many answers there are; each is one that the host can read."""
    count = at = 0
    while at < len(data):
        json_length, payload_length = parse_header(data[at : at + HEADER.size])
        at += HEADER.size
        answer = parse_message(data[at : at + json_length])
        at += json_length + payload_length
        assert at <= len(data)
        count += 1
        if answer["ok"] is not True:
            assert answer["ok"] is False and answer["error"] in CODES
            assert isinstance(answer["message"], str) and 0 < len(answer["message"]) <= 2000
            assert not payload_length
    return count


GUEST = Guest()


def _run(data: bytes) -> None:
    script = Script(data)
    fate = GUEST.fate = Script(script.string())
    performed = ends = 0

    def end() -> None:
        nonlocal ends
        ends += 1

    agent = Operations(None, SETTINGS, {"agent": 1.5}, end)  # type: ignore[arg-type]
    if script.below(2):
        agent.standby = Standby()  # type: ignore[assignment]

    def perform(request: dict[str, object], payload: bytes, peer: int) -> Answer | None:
        nonlocal performed
        performed += 1
        assert peer == 99
        answer = agent.perform(request, payload, peer)
        if answer is None:  # the connection is a port's from now on, whose answer it is
            performed -= 1
        return answer

    connection: Any = Connection(script, fate)
    Server(None, perform, None).serve(connection)  # type: ignore[arg-type]
    assert connection.closed
    if not connection.broken:
        assert answers(bytes(connection.sent)) == performed


NOTHING: tuple[tuple[object, dict[str, object]], ...] = (
    (
        configuration,
        {
            "time": SimpleNamespace(
                CLOCK_REALTIME=time.CLOCK_REALTIME,
                time_ns=lambda: 1_800_000_000_000_000_000,
                clock_settime_ns=GUEST.clock_settime_ns,
            ),
            "socket": SimpleNamespace(gethostname=lambda: "guest", sethostname=GUEST.sethostname),
            "system": GUEST,
            "cgroup": GUEST,
        },
    ),
    (
        operations,
        {
            "files": GUEST,
            "program": GUEST,
            "KernelProcess": Kernel,
            "Ports": lambda: GUEST,
            "Copies": Copies,
        },
    ),
    (server, {"Incoming": Bounded}),
    (network.Network, {"use": lambda self: GUEST.act()}),
    (volumes.Volumes, {"attach": lambda self, wanted: GUEST.attach(wanted)}),
)
"""What the agent's modules have in the place of a guest."""


@contextmanager
def fuzzing() -> Iterator[Run]:
    with ExitStack() as stack:
        for module, stands in NOTHING:
            stack.enter_context(mock.patch.multiple(module, **stands))
        yield _run


def seeds() -> Iterator[bytes]:
    def asked(payload: bytes = b"", **fields: object) -> bytes:
        body = json.dumps(fields).encode()
        if payload:
            return write(0, HEADER.pack(MAGIC, 1, len(body), len(payload)) + body + payload)
        return write(1, body, 0)

    def fated(*fate: int, standby: int = 0) -> bytes:
        return write(write(*fate), standby)

    start, ls, hello, wait = asked(**GOOD[START]), asked(**GOOD[EXEC]), asked(op="hello"), asked(op="wait")
    wrongs = (None, True, [], {}, "", 1e400, -1, 2**63 - 1, "\ud800", ["\0"], {"a=": "b"})
    for standby in range(2):
        everything = b""
        for number, fields in enumerate(GOOD):
            everything += asked(**fields)
            yield fated(standby=standby) + asked(**fields)
            yield fated(standby=standby) + asked(b"content", **fields)
            yield fated(*[15] * 6, standby=standby) + asked(b"content", **fields)
            for field in range(len(fields)):
                for kind in range(json_text.KINDS):
                    yield fated(standby=standby) + write(4, number, 1, 1, field, kind, 3, 5, 0)
            for name in fields:
                for wrong in wrongs:
                    yield fated(standby=standby) + asked(**{**fields, name: wrong})
        yield fated(standby=standby) + everything
        yield fated(standby=standby) + start + wait + asked(op="signal", number=0)
        yield fated(0, 0, 0, 6, standby=standby) + start + asked(op="stacks")
        for fate in range(16):
            yield fated(0, fate, 0, fate, fate, standby=standby) + start + wait
            yield fated(0, 0, fate, fate, 0, fate, fate, standby=standby) + asked(op="rehearse") * 2
            yield fated(0, fate, standby=standby) + asked(op="rehearse")
            yield fated(*[fate] * 8, standby=standby) + ls + hello
    for step in (2**63 - 1, -(2**63 - 1)):
        yield fated() + asked(op="configure", step=step)
    yield fated() + start * 2 + wait + asked(op="status")
    yield fated(0, 15) + asked(op="read", path="p" * 3000)
    for number in range(len(GOOD)):
        yield fated(standby=1) + write(5, number, 0, b"x" * (MAX_ENTROPY + 1), 0)
    for op in range(len(NAMES)):
        yield fated(standby=1) + write(3, op, 2, 6, 4, 2, b"ab", 5, 1, 3, 0)
    for forged in (12, 13, 14, 15):
        yield fated() + write(1, b'{"op":"hello"}', forged, MAX_PAYLOAD + 1)
        yield fated() + write(1, b'{"op":"hello"}', forged, 20)
    for how in range(8):
        yield fated(0, how, 5, how) + hello * 2
        yield fated(5, 3, how, 1, 1, 0, how) + hello * 2
    # Nesting that is just not too deep to be read.
    for depth in range(930, 1000, 2):
        nested = b"[" * depth + b"]" * depth
        body = b'{"op":"start","argv":["a"],"connection":{"k":' + nested + b"}}"
        yield fated() + write(1, body, 0)
