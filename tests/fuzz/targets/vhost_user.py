"""Fuzz target: what QEMU says, or who has taken it over: the vhost-user socket, its messages and files.

A script is what the other end of the socket does: messages with honest or forged headers and payloads, raw
bytes, cut into pieces, each with any number of files of every kind; whole set-ups of a ring, so that the
fuzzer gets behind them; bytes stored in the memory that was handed over; kicks; replies that are not read. A
real `UserspaceVsock` with its channel, back-end, rings and device reads it. The socket is `Wire`; files,
mappings and epoll are real; the event loop is `loop.py`'s.

Whatever comes, nothing but an error in `failed` comes out of a callback; what waits is bounded; a reply is
one that vhost-user has; and at the end every file that was handed over is closed, once.
"""

from __future__ import annotations

import array
import fcntl
import logging
import mmap
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.vhost_user.protocol import HEADER_SIZE, MAX_FILES, MAX_PAYLOAD, NO_FILE, Request
from sandbox_kernel.vsock import packet
from sandbox_kernel.vsock.userspace import UserspaceVsock
from tests.fuzz.loop import Loop, running
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

CID = 3
MEMORY = 0x8000
ZEROS = bytes(MEMORY)
GUEST, USER = 0x1000_0000, 0x7F00_0000_0000
"""Where the guest and QEMU have the memory in an honest table."""
SIZE = 8
REQUESTS = tuple(Request)
MOST_STEPS = 200
ANSWERED = {
    *(Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.GET_QUEUE_NUM, Request.GET_CONFIG),
    Request.GET_VRING_BASE,
}


class Wire:
    """Our end of the vhost-user socket, as the channel uses it."""

    def __init__(self) -> None:
        self._pieces: list[tuple[bytes, list[int]]] = []
        self.closed = self.ended = False
        self.full = 0
        """1: takes no reply; 2: part of one; 3: is broken."""
        self.acknowledged = False

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def fileno(self) -> int:
        return 98

    def put(self, data: bytes, files: list[int]) -> None:
        if data and not self.closed:
            self._pieces.append((data, files))
        else:
            close(files)

    def recvmsg(self, count: int, space: int, flags: int) -> tuple[bytes, list[Any], int, None]:
        assert not self.closed and count > 0 and flags == socket.MSG_CMSG_CLOEXEC
        if not self._pieces:
            if self.ended:
                return b"", [], 0, None
            raise ConnectionResetError if self.full == 3 else BlockingIOError
        data, files = self._pieces.pop(0)
        if len(data) > count:
            self._pieces.insert(0, (data[count:], []))
        fit = (space - socket.CMSG_SPACE(0)) // 4
        close(files[fit:])
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files[:fit]).tobytes())
        return data[:count], [rights] if files else [], socket.MSG_CTRUNC if files[fit:] else 0, None

    def send(self, reply: bytes) -> int:
        assert not self.closed
        number, flags, size = struct.unpack_from("<III", reply)
        assert flags == 5 and size == len(reply) - HEADER_SIZE <= MAX_PAYLOAD
        assert Request(number) in ANSWERED or reply[HEADER_SIZE:] == bytes(8)
        if number == Request.GET_VRING_BASE:
            index, base = struct.unpack_from("<II", reply, HEADER_SIZE)
            assert index < 2 and base < 1 << 16
        if self.full == 1:
            raise BlockingIOError
        if self.full == 3:
            raise BrokenPipeError
        return len(reply) - (self.full == 2)

    def close(self) -> None:
        self.closed = True
        for _, files in self._pieces:
            close(files)
        self._pieces.clear()


EVENT, RAM, FULL = 0, 1, 8


class Kinds:
    """One file of each kind that somebody might hand over; runs get duplicates."""

    def __init__(self) -> None:
        self.memory = _memfd("memory", MEMORY, fcntl.F_SEAL_SHRINK)
        self.view = memoryview(mmap.mmap(self.memory, MEMORY))
        self._pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.files = (
            os.eventfd(0, os.EFD_CLOEXEC),
            self.memory,
            _memfd("memory", MEMORY, 0),
            _memfd("[eventfd]", MEMORY, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK),
            self._pipe[1],
            os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
            os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE),
            os.open(f"/proc/self/fd/{self.memory}", os.O_RDONLY | os.O_CLOEXEC),
            os.eventfd(0, os.EFD_CLOEXEC),
        )
        os.eventfd_write(self.files[FULL], (1 << 64) - 2)

    def close(self) -> None:
        close([*self.files, self._pipe[0]])


def _memfd(name: str, size: int, seals: int) -> int:
    file = os.memfd_create(name, os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(file, size)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def close(files: list[int]) -> None:
    for file in files:
        os.close(file)


class Session:
    """One run: a device, and the other end of its socket."""

    def __init__(self, script: Script, loop: Loop) -> None:
        self.script = script
        self.loop = loop
        self.wire = Wire()
        self.given: set[int] = set()
        KINDS.view[:] = ZEROS
        self.host = UserspaceVsock(CID, connection=self.wire)  # type: ignore[arg-type]

    def file(self, kind: int) -> int:
        file = os.dup(KINDS.files[kind % len(KINDS.files)])
        self.given.add(file)
        return file

    def say(self, request: int, payload: bytes, files: tuple[int, ...] = (), flags: int = 1) -> None:
        head = struct.pack("<III", request, flags, len(payload))
        self.wire.put(head + payload, [self.file(kind) for kind in files])

    # Steps

    def run(self) -> None:
        self.loop.run()
        self.check()

    def message(self) -> None:
        """A request with a payload of its own or another form."""
        script = self.script
        request, form = script.choose(REQUESTS), script.below(5)
        if form == 0:
            payload = script.string()
        elif form == 1:
            payload = struct.pack("<Q", script.number())
        elif form == 2:
            payload = struct.pack("<II", script.number() % (1 << 32), script.number() % (1 << 32))
        elif form == 3:
            at = [USER + number if number < 1 << 16 else number for number in map(_number, [script] * 3)]
            payload = struct.pack("<IIQQQQ", script.below(4), script.below(2), *at, 0)
        else:
            payload = table([self._row() for _ in range(script.below(10))])
        files = tuple(script.number() for _ in range(script.below(10)))
        self.say(request, payload, files, 9 if script.below(2) else 1)

    def _row(self) -> tuple[int, int, int, int]:
        script = self.script
        guest, size, user, offset = (script.number() for _ in range(4))
        if guest < 200:
            guest = GUEST + 0x1000 * guest
        if user < 200:
            user = USER + 0x1000 * user
        return (
            guest,
            size if size >= 200 else 0x1000 * size,
            user,
            offset if offset >= 200 else 0x1000 * offset,
        )

    def raw(self) -> None:
        script = self.script
        data = script.string()
        files = [self.file(script.number()) for _ in range(script.below(12))]
        self.wire.put(data, files)

    def header(self) -> None:
        script = self.script
        numbers = (script.number() % (1 << 32), script.number() % 16, script.number() % (1 << 32))
        self.wire.put(struct.pack("<III", *numbers), [])

    def in_pieces(self) -> None:
        """The last message comes in two."""
        if self.wire._pieces:
            data, files = self.wire._pieces.pop()
            at = self.script.below(len(data) + 1)
            if 0 < at < len(data):
                self.wire._pieces += [(data[:at], files), (data[at:], [])]
            else:
                self.wire._pieces.append((data, files))

    def features(self) -> None:
        self.say(Request.SET_PROTOCOL_FEATURES, struct.pack("<Q", self.script.choose((0x209, 8, 0, 1))))
        bits = (1 << 32 | 1 << 30) if self.script.below(2) == 0 else 1 << 32
        self.say(Request.SET_FEATURES, struct.pack("<Q", bits))

    def memory(self) -> None:
        self.say(Request.SET_MEM_TABLE, table([(GUEST, MEMORY, USER, 0)]), (RAM,))

    def ring(self) -> None:
        """An honest set-up of one ring, but for the kinds of its files."""
        script = self.script
        index, base, kick, call = script.below(2), script.number(), script.number(), script.number()
        pair = struct.Struct("<II").pack
        at = USER + 0x400 * index
        self.say(Request.SET_VRING_NUM, pair(index, SIZE))
        self.say(Request.SET_VRING_BASE, pair(index, base % (1 << 32)))
        self.say(Request.SET_VRING_ADDR, struct.pack("<IIQQQQ", index, 0, at, at + 0x200, at + 0x100, 0))
        self.say(Request.SET_VRING_KICK, struct.pack("<Q", index), (kick,))
        self.say(Request.SET_VRING_CALL, struct.pack("<Q", index), (call,))
        self.say(Request.SET_VRING_ENABLE, pair(index, 1))

    def store(self) -> None:
        place, data = self.script.number(), self.script.bytes(1 + self.script.below(64))
        place %= MEMORY - len(data)
        KINDS.view[place : place + len(data)] = data

    def send(self) -> None:
        """A packet of no stream, and a buffer for its answer."""
        slot, ahead = self.script.below(SIZE), self.script.below(4)
        for queue, flags in ((1, 0), (0, 2)):
            address = 0x1000 + 0x100 * slot + 0x1000 * queue
            row = struct.pack("<QIHH", GUEST + address, packet.SIZE + (not queue) * 64, flags, 0)
            ring = 0x400 * queue
            KINDS.view[ring + 16 * slot : ring + 16 * slot + 16] = row
            index = int.from_bytes(KINDS.view[ring + 0x102 : ring + 0x104], "little")
            place = ring + 0x104 + 2 * (index % SIZE)
            KINDS.view[place : place + 2] = slot.to_bytes(2, "little")
            KINDS.view[ring + 0x102 : ring + 0x104] = ((index + ahead) & 0xFFFF).to_bytes(2, "little")
            if queue:
                header = packet.LAYOUT.pack(CID, 2, 5, 6, 0, 1, packet.REQUEST, 0, 4096, 0)
                KINDS.view[address : address + packet.SIZE] = header
        self.kick()

    def open(self) -> None:
        """The host opens a stream, and says something on it."""
        ours, theirs = socket.socketpair()
        with ours:
            try:
                self.host._device.open(self.script.below(4), theirs, lambda accepted: None)
            except ConnectionRefusedError:
                theirs.close()
            else:
                ours.send(b"something")

    def kick(self) -> None:
        os.eventfd_write(KINDS.files[EVENT], 1)

    def reader(self) -> None:
        """Replies are not read any more, or again."""
        self.wire.full = self.script.below(4)

    def end(self) -> None:
        self.wire.ended = True

    def check(self) -> None:
        channel, device = self.host._channel, self.host._device
        assert len(channel._bytes) <= MAX_PAYLOAD and len(channel._files) <= MAX_FILES
        for index, ring in device._rings.items():
            queue: Any = ring.queue
            assert ring.index == index and device._kicks.get(index, -1) == ring.kick
            assert not (queue._table_at % 16 or queue._available_at % 2 or queue._used_at % 4)
        if self.host._closed:
            assert self.wire.closed and not self.loop.readers

    def close(self) -> None:
        failed: Any = self.host.failed
        if failed.done():
            assert isinstance(failed.value, GuestProtocolError) and 0 < len(str(failed.value)) < 300
            assert self.host._closed
        self.host._close()
        self.check()
        poll = select.poll()
        for file in self.given:
            poll.register(file, 0)
        closed = [file for file, events in poll.poll(0) if events == select.POLLNVAL]
        assert len(closed) == len(self.given), "a file is left open"


def _number(script: Script) -> int:
    return script.number()


def table(rows: list[tuple[int, int, int, int]]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return struct.pack("<II", len(rows), 0) + b"".join(struct.pack("<QQQQ", *row) for row in rows)


STEPS: tuple[Callable[[Session], None], ...] = (
    Session.run,
    Session.message,
    Session.ring,
    Session.memory,
    Session.features,
    Session.send,
    Session.kick,
    Session.store,
    Session.raw,
    Session.header,
    Session.in_pieces,
    Session.reader,
    Session.end,
    Session.open,
)


def _run(data: bytes) -> None:
    script = Script(data)
    with running() as loop:
        session = Session(script, loop)
        for _ in range(MOST_STEPS):
            if not script.more() or session.host._closed:
                break
            script.choose(STEPS)(session)
        session.run()
        session.close()


@contextmanager
def fuzzing() -> Iterator[Run]:
    global KINDS
    KINDS = Kinds()
    log = logging.getLogger("sandbox_kernel.vsock.userspace")
    log.disabled = True
    try:
        yield _run
    finally:
        log.disabled = False
        KINDS.close()
        del KINDS


def seeds() -> Iterator[bytes]:
    run, message, ring, memory, features, send, kick, store, raw = range(9)
    header, pieces, reader, end, open_ = range(9, len(STEPS))
    up = write(features, 0, 0, memory, ring, 0, 0, EVENT, EVENT, ring, 1, 0, EVENT, EVENT, run)
    yield up + write(*(send, 0, 1, run) * 10)
    yield write(reader, 3, run)
    yield up + write(send, 3, 1, run, memory, run, send, 4, 1, kick, run, end, run)
    yield write(
        memory, ring, 0, 5, EVENT, EVENT, ring, 1, 65_535, EVENT, EVENT, features, 2, 1, run, send, 0, 1, run
    )
    for kind in range(9):
        for other in range(9):
            yield write(features, 0, 0, memory, ring, 0, 0, kind, other, run)
            yield write(
                features,
                0,
                0,
                memory,
                ring,
                1,
                0,
                kind,
                other,
                ring,
                0,
                0,
                EVENT,
                other,
                run,
                send,
                0,
                1,
                run,
            )
        yield write(message, REQUESTS.index(Request.SET_MEM_TABLE), 4, 1, 0, 8, 0, 0, 1, kind, 1, run)
    for number, request in enumerate(REQUESTS):
        for need in range(2):
            for before in (b"", up):
                yield before + write(message, number, 1, 0, 0, need, run)
                yield before + write(message, number, 1, 1, 1, EVENT, need, run)
                yield before + write(message, number, 1, NO_FILE, 0, need, run)
                yield before + write(message, number, 2, 1, 0, 0, need, run, ring, 1, 0, EVENT, EVENT, run)
                yield before + write(message, number, 2, 2, 8, 0, need, run)
                yield before + write(message, number, 3, 0x400, 0x500, 0x600, 1, 0, 0, need, run)
                yield before + write(message, number, 0, b"\0" * 12, 0, need, run)
        yield up + write(message, number, 1, 1, 1, EVENT, 0, pieces, 12, run, pieces, 7, run)
        yield write(header, int(request), 1, MAX_PAYLOAD + 1, run)
        yield write(message, number, 2, 1, 0, 9, *range(9), run)
    table_at = REQUESTS.index(Request.SET_MEM_TABLE)
    rows = [
        (0, 1, 0, 0, 1, 1, 1, 1),
        (0, 4, 0, 0, 2, 4, 9, 4),
        (0, 0, 0, 0, 1, 1, 1, 1),
        (0, 9, 0, 0, 1, 1, 1, 1),
        (0, (1 << 64) - 1, 0, 0, 1, 1, 1, 1),
        (0, 4000, 0, 4001, 1, 1, 1, 1),
    ]
    for row in rows:
        yield write(message, table_at, 4, 2, *row, 2, RAM, RAM, 0, run) + up
        yield up + write(message, table_at, 4, 2, *row, 2, RAM, RAM, 0, run)
        yield write(message, table_at, 4, 2, *row, 1, RAM, 0, run)
    yield write(message, table_at, 4, 9, *(1, 1, 1, 1) * 9, 0, 0, run)
    base, where = REQUESTS.index(Request.SET_VRING_BASE), REQUESTS.index(Request.GET_VRING_BASE)
    for number in (65_535, 65_536):
        yield write(message, base, 2, 1, number, 0, 0, message, where, 2, 1, 0, 0, 0, run)
    for full in (1, 2, 3):
        yield write(features, 0, 0, reader, full, message, 0, 1, 0, 0, 0, run)
    config = REQUESTS.index(Request.GET_CONFIG)
    for offset, size in ((0, 8), (4, 5), (0, 256), (0xFFFF_FFFF, 2)):
        payload = struct.pack("<III", offset, size, 0) + bytes(8)
        yield write(message, config, 0, payload, 0, 0, run)
    yield write(raw, b"\x01\0\0\0\x01\0\0\0\0\0\0\0" * 3, 11, *range(11), run)
    yield write(raw, b"\x01\0\0", 2, 0, 1, run, raw, b"\0\x01", 8, *range(8), run, end, run)
    yield up + write(open_, 1, run, send, 0, 1, run, ring, 0, 0, EVENT, EVENT, run, open_, 2, send, 1, 1, run)
    yield up + write(open_, 1, memory, run, end, run)
    yield write(
        features, 0, 0, memory, ring, 0, 0, EVENT, FULL, ring, 1, 0, EVENT, FULL, run, send, 0, 1, run
    )
    yield up + write(store, 0x100, 3) + b"\0\0\xff\xff" + write(kick, run)
