"""Fuzz target: what a guest's network tells the supervisor: netlink's log, and that of the guest's DNS.

A script is a list of steps: a datagram of netlink's log, of any bytes or of attributes around a packet that
the guest made up; bytes of the resolver's log, in pieces, as any text or in the words that it has, with names
that look like them; a cell that begins; another policy; time that passes. What reads it is the whole of
`Network` after the sockets; namespace and resolver are stood in for, and Linux' clock.

Nothing may come out. What the guest did is told in bounded sentences, few of a cell; the file has a JSON
object a line; and what is remembered, and what the filter is asked for, is bounded. An address gets a new
life only in sets of the policy in force, and never because a name looks like an answer.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import struct
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from sandbox_kernel.jail.cgroup import Cgroup
from sandbox_kernel.network import network as network_module
from sandbox_kernel.network import refusals as refusals_module
from sandbox_kernel.network.network import Network
from sandbox_kernel.network.ruleset import refresh
from sandbox_kernel.policy import policy
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

DATAGRAM, ATTRIBUTES, BYTES, LINE, ANSWER, CELL, POLICY, TIME = range(8)
POLICIES = (
    policy("allowlist", ["x.org", "*.y.org:443", "a.y.org", "10.0.0.0/8"], ["bad.y.org", "8.8.8.8"]),
    policy("public", ["x.org"], ["*.bad.org"]),
    policy("full"),
)
REMEMBERED = 8
BEGIN = "Nov 26 21:40:38 dnsmasq[7]: "
WORDS = (
    *("query[A]", "query[AAAA]", "query[TXT]", "reply", "cached", "config", "is", "from", "forwarded", "to"),
    *(
        "NXDOMAIN",
        "<CNAME>",
        "possible DNS-rebind attack detected:",
        "x.org",
        "a.y.org",
        "bad.y.org",
        "y.org",
    ),
    *(
        "1.2.3.4",
        "2001:db8::1",
        "198.18.0.2/53",
        "dnsmasq[7]:",
        "dnsmasq: ",
        "started, ",
        BEGIN,
        "1",
        "2",
        "\r",
    ),
)
PREFIXES = (b"unlisted\0", b"deny:1\0", b"deny:99\0", b"deny:x\0", b"spoofed\0", b"\xff\0\0", b"private")
MOST_STEPS = 60
SENTENCE = 2000
SENTENCES = 9


class File:
    """Where refusals are noted."""

    def __init__(self, path: Path) -> None:
        pass

    def setFormatter(self, formatter: logging.Formatter) -> None:
        pass

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        assert "\n" not in text and text.isascii()
        note = json.loads(text)
        assert set(note) == {"time", "cell", "destination", "rule", "reason"}

    def close(self) -> None:
        pass


class Log:
    """Netlink's socket, with datagrams in it."""

    def __init__(self) -> None:
        self.datagrams: list[bytes] = []

    def recv(self, size: int) -> bytes:
        if not self.datagrams:
            raise BlockingIOError
        data = self.datagrams.pop(0)
        if not data:
            raise OSError(105, "No buffer space available")
        return data[:size]


class Namespace:
    """The namespace, and the filter in it."""

    def __init__(self) -> None:
        self.log = Log()
        self.asked = 0

    async def ask(self, op: str, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
        assert op == "rules"
        assert len(arguments["text"]) < 1 << 20
        self.asked += 1
        return {}, []


class World:
    """One run."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._namespace = Namespace()
        self._cell = 0
        self._cells: dict[str, int] = {}
        self._refreshing: list[Coroutine[Any, Any, None]] = []
        self._now = 0.0
        self._data = b""
        self._network = Network(Cgroup(()), Path("/nowhere"), False)
        self._network._namespace = self._namespace  # type: ignore[assignment]
        self._network._task = self._task  # type: ignore[method-assign, assignment]
        self._network.report_to(self._name, self._tell, self._trouble)

    def run(self) -> None:
        self._judge(0)
        steps = 0
        while self._script.more() and steps < MOST_STEPS:
            steps += 1
            self._step()
            self._look()
        self._pass(1.0)
        for coroutine in self._refreshing:
            coroutine.close()

    def _step(self) -> None:
        script, step = self._script, self._script.below(8)
        if step in (DATAGRAM, ATTRIBUTES):
            datagram = script.string() if step == DATAGRAM else message(script)
            self._namespace.log.datagrams.append(datagram)
            self._network._read_log()
        elif step == BYTES:
            self._write(script.string())
        elif step == LINE:
            blank = script.choose((" ", "", "\n"))
            words = [script.choose(WORDS) for _ in range(script.below(16))]
            self._write((BEGIN + blank.join(words)).encode() + b"\n")
        elif step == ANSWER:
            self._answer()
        elif step == CELL:
            self._cell += 1
        elif step == POLICY:
            self._judge(script.below(3))
        else:
            self._pass(script.below(50))

    def _answer(self) -> None:
        """A question and its answer, of a name with anything in it but the end of a line."""
        script, forged = self._script, self._forged()
        serial, name = script.below(4), script.string().decode("latin-1").replace("\n", "?")
        name += script.choose((".y.org", "x.org", "", " is 6.6.6.6", " from 6.6.6.6"))
        kind = script.choose(("query[A]", "query[TXT]"))
        self._write(f"{BEGIN}{serial} 198.18.0.2/5 {kind} {name} from 198.18.0.2\n".encode("latin-1"))
        place = script.choose(("1.2.3.4", "1.2.3.5", "2001:db8::1"))
        self._write(f"{BEGIN}{serial} 198.18.0.2/5 reply {name} is {place}\n".encode("latin-1"))
        assert forged or not self._forged(), name

    def _forged(self) -> bool:
        return any("6.6.6.6" in addresses for addresses in self._network._stale.values())

    def _write(self, data: bytes) -> None:
        piece = self._script.number() or len(data)
        for at in range(0, len(data), max(piece, len(data) // 8, 1)):
            self._data = data[at : at + max(piece, len(data) // 8, 1)]
            self._network._read_resolver()

    def read(self, fd: int, size: int) -> bytes:
        """`os.read`."""
        data, self._data = self._data, b""
        assert 0 < len(data) <= size
        return data

    def monotonic(self) -> float:
        """`time.monotonic`."""
        return self._now

    def time(self) -> float:
        return 1e9 + self._now

    def _judge(self, number: int) -> None:
        finish(self._network._filter(POLICIES[number]))

    def _pass(self, seconds: float) -> None:
        self._now += seconds
        refreshing, self._refreshing = self._refreshing, []
        for coroutine in refreshing:
            finish(coroutine)
        assert not self._network._stale

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self._refreshing.append(coroutine)

    def _look(self) -> None:
        found = self._network
        assert len(found._names) <= REMEMBERED
        assert len(found._questions) <= REMEMBERED
        assert len(found._refreshed) <= REMEMBERED
        assert len(found._rest) <= 4096
        names = set(found._questions.values())
        for name in names:
            assert not re.search(r"\s", name, re.ASCII)
        sets = {
            f"n{number}v{version}g{found._generation}"
            for number, rule in enumerate(found.policy.allow)
            if rule.domain
            for version in (4, 6)
        }
        assert set(found._stale) <= sets
        for place, addresses in found._stale.items():
            for address in addresses:
                assert f"v{ipaddress.ip_address(address).version}g" in place
        assert refresh(found._stale).count("\n") <= 1 + 3 * 2 * MOST_STEPS * 4096

    def _name(self) -> str:
        return f"cell-{self._cell}" if self._cell % 4 else ""

    def _tell(self, sentence: str) -> None:
        assert sentence.startswith("The network policy (") and len(sentence) < SENTENCE
        assert self._name()
        self._cells[self._name()] = self._cells.get(self._name(), 0) + 1
        assert self._cells[self._name()] <= SENTENCES

    def _trouble(self, sentence: str) -> None:
        raise AssertionError("nothing has ended")


def message(script: Script) -> bytes:
    """A datagram of the log, nearly as Linux makes them."""
    text = b""
    for _ in range(script.below(4)):
        head = script.choose(
            (b"\x45" + bytes(8) + b"\x06" + bytes(10), b"\x60" + bytes(5) + b"\x11" + bytes(33), b"")
        )
        packet = bytearray(head + script.string())
        for _ in range(script.below(4)):
            if packet:
                packet[script.below(len(packet))] = script.below(256)
        body = (
            b"\0\0\0\1" + attribute(9, bytes(packet), script) + attribute(10, script.choose(PREFIXES), script)
        )
        forged = script.below(8)
        length = script.number() % (1 << 32) if forged == 1 else 16 + len(body)
        kind = script.below(1 << 16) if forged == 2 else 4 << 8
        text += struct.pack("=IHHII", length, kind, 0, 0, 0) + body + bytes(-len(body) % 4)
    return text


def attribute(kind: int, value: bytes, script: Script) -> bytes:
    forged = script.below(8)
    length = script.below(1 << 16) if forged == 1 else 4 + len(value)
    kind = script.below(1 << 16) if forged == 2 else kind
    return struct.pack("=HH", length, kind) + value + bytes(-len(value) % 4)


def finish(coroutine: Coroutine[Any, Any, Any]) -> None:
    """Runs what waits for nothing here."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    raise AssertionError("it waits")


async def sleep(seconds: float) -> None:
    pass


def _run(data: bytes) -> None:
    world = World(Script(data))
    CLOCK.world = world
    world.run()


class Clock:
    """What the modules under test take for the system: the clock, and the file that they read."""

    world: World

    def monotonic(self) -> float:
        return self.world.monotonic()

    def time(self) -> float:
        return self.world.time()

    def read(self, fd: int, size: int) -> bytes:
        return self.world.read(fd, size)


CLOCK = Clock()


@contextmanager
def fuzzing() -> Iterator[Run]:
    logging.disable()
    with (
        patch.object(network_module, "os", CLOCK),
        patch.object(network_module, "time", CLOCK),
        patch.object(network_module, "_REMEMBERED", REMEMBERED),
        patch.object(network_module.asyncio, "sleep", sleep),
        patch.object(refusals_module, "time", CLOCK),
        patch.object(refusals_module, "LogFile", File),
    ):
        try:
            yield _run
        finally:
            logging.disable(logging.NOTSET)


def seeds() -> Iterator[bytes]:
    packet = bytes([93, 184, 216, 34]) + b"\x9c\x40\x01\xbb"
    one = (0, packet, 0, 0, 0, 0, 0)
    for head in range(3):
        for forged in range(3):
            yield write(
                CELL, ATTRIBUTES, 1, head, packet * 3, 1, 1, 4, forged, 7, 0, 0, 0, CELL, ATTRIBUTES, 1, *one
            )
    yield write(CELL, *(ATTRIBUTES, 2, *one, *one) * 12)
    yield write(CELL, *(ATTRIBUTES, 1, 0, packet, 1, 19, 9, 0, 1, 0, 0) * 3, ATTRIBUTES, 0, DATAGRAM, b"")
    for which in range(3):
        yield write(
            POLICY, which, CELL, ANSWER, 1, b"a", 0, 0, 0, 0, 0, TIME, 30, ANSWER, 1, b"a", 0, 0, 0, 2, 0
        )
    yield write(ANSWER, 1, b"a.y.org is 6.6.6.6 b", 0, 0, 0, 0, 0, TIME, 1)
    yield write(ANSWER, 1, b"dnsmasq[1]: 1 a/1 reply a.y.org", 3, 0, 0, 0, 0, TIME, 1)
    yield write(ANSWER, 1, b"a", 0, 1, 0, 0, 0, ANSWER, 2, b"a", 0, 0, 3, 0, 7, POLICY, 0, TIME, 9)
    yield write(
        CELL, LINE, 0, 6, 23, 17, 5, 16, 6, 10, 0, LINE, 0, 2, 12, 15, 0, LINE, 0, 6, 23, 17, 5, 15, 6, 10, 3
    )
    yield write(
        BYTES, b"dnsmasq: failed to create listening socket\n", 0, BYTES, b"x" * 5000, 900, BYTES, b"\n", 0
    )
    yield write(BYTES, BEGIN.encode() + b"started, version 2.90\n\n\xff\n", 5)
    yield write(*(ANSWER, 1, b"n1", 0, 0, 0, 0) * 12)
