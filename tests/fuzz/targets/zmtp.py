"""Fuzz target: `relay/zmtp.py`, the guest's bytes to messages, cut anywhere.

A script writes a stream, in pieces: anything, frames with honest or forged heads, a greeting, a READY. Each
piece is read as an event loop does, as much as there is room for. Whatever comes, the reader keeps no more
than a message may have, never has no room, and raises nothing but `GuestProtocolError`; and what it gives out
is what a second reader says, which has all of the stream at once and is too simple to be wrong.

The reader's sizes are a hundredth of what they are (`SIZES`), so that a run that fills its memory is short;
the rules between them are kept. A script that begins with `AS_IT_IS` has the real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sandbox_kernel.errors import GuestProtocolError
from sandbox_kernel.relay import zmtp
from sandbox_kernel.relay.zmtp import Bounds, Reader
from tests.fuzz.script import Script, write
from tests.fuzz.targets import Run

SIZES = {"_BUFFER": 640, "_DIRECT": 320, "_LAZY": 1500, "_COMMAND_BYTES": 100}
REAL_SIZES = {name: getattr(zmtp, name) for name in SIZES}
BOUNDS = (Bounds(1000, 6), Bounds(3000, 40), Bounds(300, 3), Bounds(320, 1))
REAL_BOUNDS = Bounds(100_000, 40)
AS_IT_IS = 200
FILLER = b"\xaa"
"""No frame begins with it, so that a reader which has lost its place says so."""
PEERS = ("ROUTER", "XPUB", "PUB")
GREETING = zmtp.greeting()
MECHANISM = b"NULL".ljust(20, b"\0")


def stream(script: Script, largest: int) -> Iterator[bytes]:
    """What a script has the guest send, in pieces."""
    size = 0
    while script.more() and size < largest:
        step = STEPS[script.below(len(STEPS))]
        for piece in cut(step(script, largest), script):
            size += len(piece)
            yield piece


def cut(data: bytes, script: Script) -> list[bytes]:
    """In one piece, in two, in three or, when it is short, byte by byte."""
    how = script.below(4)
    if how == 3 and len(data) < 70:
        return [data[at : at + 1] for at in range(len(data))]
    places = sorted(script.below(len(data) + 1) for _ in range(min(how, 2)))
    return [data[a:b] for a, b in itertools.pairwise([0, *places, len(data)]) if a < b]


def _anything(script: Script, largest: int) -> bytes:
    return script.string()


def _greeting(script: Script, largest: int) -> bytes:
    return GREETING


def _forged_greeting(script: Script, largest: int) -> bytes:
    forged = bytearray(GREETING)
    forged[script.below(64)] = script.below(256)
    return bytes(forged)


def _ready(script: Script, largest: int) -> bytes:
    return zmtp.ready(script.choose(PEERS), script.bytes(script.below(8)))


def _properties(script: Script, largest: int) -> bytes:
    """A READY whose lengths may be false."""
    body = b"\x05READY"
    for _ in range(script.below(4)):
        name = script.choose((b"Socket-Type", b"identity", b"SOCKET-TYPE", script.bytes(script.below(4))))
        value = script.choose((b"ROUTER", b"PUB", script.string()[:100]))
        body += bytes([(len(name) + script.below(3)) % 256]) + name
        body += ((len(value) + script.below(3)) % (1 << 32)).to_bytes(4, "big") + value
    return bytes([4, len(body)]) + body if len(body) < 256 else body


def _frame(script: Script, largest: int) -> bytes:
    """A frame as its head says, of bytes that cost nothing."""
    flags, length = script.below(8), script.number() % largest
    long = flags & 2 or length > 255
    head = bytes([flags | 2]) + length.to_bytes(8, "big") if long else bytes([flags, length])
    return head + FILLER * length


def _head(script: Script, largest: int) -> bytes:
    """The head of a frame that may never come."""
    flags = script.below(256)
    return bytes([flags]) + script.number().to_bytes(8, "big")[0 if flags & 2 else 7 :]


def _padding(script: Script, largest: int) -> bytes:
    return FILLER * (script.number() % largest)


STEPS = (_anything, _greeting, _ready, _frame, _head, _padding, _forged_greeting, _properties)


Said = tuple[list[bytes], int]
"""A message and its bytes, which are more than it has when it was left out."""


def read(reader: Reader, piece: bytes) -> Iterator[Said]:
    """Gives a reader a piece, as much at once as it takes."""
    at, end = 0, len(piece)
    while at < end:
        space = reader.space()
        count = len(space)
        assert count, "no room"
        if count >= end - at:
            count = end - at
            space[:count] = piece[at:] if at else piece
        else:
            space[:] = piece[at : at + count]
        at += count
        for message in reader.received(count):
            if isinstance(message, zmtp.LeftOut):
                assert sum(map(len, message.frames)) < message.size
                yield [bytes(frame) for frame in message.frames], message.size
            else:
                yield [bytes(frame) for frame in message], sum(map(len, message))


def check(reader: Reader, bounds: Bounds) -> None:
    """What a reader keeps is within its bounds."""
    held = sum(map(len, reader._frames))
    assert held <= bounds.bytes
    if reader._leaves_out:
        assert held <= reader._size <= bounds.bytes * zmtp._FAULT
    else:
        assert held == reader._size and len(reader._frames) == reader._number
    assert len(reader._frames) <= reader._number <= bounds.frames
    assert 0 <= reader._start <= reader._end <= len(reader._buffer) == zmtp._BUFFER
    if reader._large is not None:
        assert held + len(reader._large) <= bounds.bytes
        assert reader._filled < len(reader._large)
    assert reader.greeted or not reader.ready


def simply(stream: bytes, bounds: Bounds) -> tuple[list[Said], bool]:
    """What a stream has, and whether it ends by a violation: RFC 23 with the reader's bounds, at once."""
    messages: list[Said] = []
    frames: list[bytes] = []
    number = total = 0
    if len(stream) < 64:
        return messages, False
    if stream[0] != 0xFF or stream[9] != 0x7F or stream[10] < 3 or stream[12:32] != MECHANISM:
        return messages, True
    at, ready = 64, False
    while len(stream) - at >= 2:
        flags = stream[at]
        size = 8 if flags & 2 else 1
        if len(stream) - at < 1 + size:
            break
        length = int.from_bytes(stream[at + 1 : at + 1 + size], "big")
        command, more = flags & 4, flags & 1
        if flags > 7 or (command and more) or (command and (length > zmtp._COMMAND_BYTES or number)):
            return messages, True
        if not command and (
            not ready or total + length > bounds.bytes * zmtp._FAULT or number >= bounds.frames
        ):
            return messages, True
        body = stream[at + 1 + size : at + 1 + size + length]
        if len(body) < length:
            break
        at += 1 + size + length
        if not command:
            number, total = number + 1, total + length
            if total <= bounds.bytes:
                frames.append(body)
            if not more:
                messages.append((frames, total))
                frames, number, total = [], 0, 0
        elif not ready:
            if _peer(body) not in PEERS:
                return messages, True
            ready = True
    return messages, False


def _peer(body: bytes) -> str | None:
    """The socket type that a READY names; None when it is none."""
    if body[:6] != b"\x05READY":
        return None
    at, found = 6, ""
    while at < len(body):
        name = body[at + 1 : at + 1 + body[at]]
        at += 1 + len(name)
        length = int.from_bytes(body[at : at + 4], "big")
        if len(body) - at < 4 + length:
            return None
        if name.lower() == b"socket-type":
            found = body[at + 4 : at + 4 + length].decode("ascii", "replace")
        at += 4 + length
    return found


def _run(data: bytes) -> None:
    script = Script(data)
    which = script.number()
    if which == AS_IT_IS:
        with sizes(REAL_SIZES):
            _compare(script, REAL_BOUNDS, 150_000)
    else:
        _compare(script, BOUNDS[which % len(BOUNDS)], 4000)


def _compare(script: Script, bounds: Bounds, largest: int) -> None:
    reader = Reader("shell", PEERS, bounds)
    sent = bytearray()
    messages: list[Said] = []
    broken = False
    try:
        for piece in stream(script, largest):
            sent += piece
            messages += read(reader, piece)
            check(reader, bounds)
    except GuestProtocolError as error:
        assert "channel shell" in str(error) and len(str(error)) < 200
        broken = True
    expected, wrong = simply(bytes(sent), bounds)
    assert messages == expected[: len(messages)]
    for frames, size in messages:
        assert len(frames) <= bounds.frames and sum(map(len, frames)) <= bounds.bytes
        assert size <= bounds.bytes * zmtp._FAULT
    assert broken == wrong, "one reader takes what the other refuses"
    if broken:
        return
    assert len(messages) == len(expected)
    _returns([frames for frames, size in messages if size <= bounds.bytes], bounds)


def _returns(messages: list[list[bytes]], bounds: Bounds) -> None:
    """What `encode` writes, a reader gives back."""
    if not messages:
        return
    reader = Reader("shell", PEERS, bounds)
    pieces = [GREETING, zmtp.ready("ROUTER", b"")]
    for message in messages:
        pieces += zmtp.encode(message)
    assert [frames for frames, _ in read(reader, b"".join(pieces))] == messages


@contextmanager
def sizes(given: Mapping[str, int]) -> Iterator[None]:
    """The reader with these sizes."""
    before = {name: getattr(zmtp, name) for name in given}
    for name, size in given.items():
        setattr(zmtp, name, size)
    try:
        yield
    finally:
        for name, size in before.items():
            setattr(zmtp, name, size)


@contextmanager
def fuzzing() -> Iterator[Run]:
    with sizes(SIZES):
        yield _run


def seeds() -> Iterator[bytes]:
    anything, greeting, ready, frame, head, padding, forged, properties = range(len(STEPS))
    for how in range(4):
        shaken = write(greeting, how, ready, 0, 0, how)
        if how in (1, 2):
            shaken = write(greeting, how, 30, 31)[: 2 + how] + write(ready, 0, 0, how, 3, 9)[: 4 + how]
        for bounds in range(len(BOUNDS)):
            begin = write(bounds) + shaken
            yield begin + write(frame, 1, 5, 0, frame, 1, 0, 0, frame, 0, 200, 0)
            yield begin + write(frame, 3, 300, 1, 5, frame, 2, 20, 2, 3, 4)
            yield begin + write(frame, 1, 250, 0, frame, 0, 2, 0, frame, 0, 319, 1, 100)
            yield begin + write(frame, 2, 320, 1, 10, frame, 0, 3, 0, frame, 1, 600, 0, frame, 0, 1, 0)
            yield begin + write(frame, 1, 1600, 2, 700, 900, frame, 0, 70, 0)
            yield begin + write(head, 2, 600, 0, padding, 300, 0, padding, 300, 0, frame, 0, 1, 0)
            yield begin + write(head, 2, 600, 0, padding, 700, 0)
            yield begin + write(*(frame, 1, 0, 0) * 50)
            yield begin + write(frame, 4, 10, 3, frame, 6, 100, 0, frame, 0, 1, 0)
            yield begin + write(head, 2, (1 << 64) - 1, 0)
            yield begin + write(frame, 1, 3, 0, frame, 1, 1100, how, 9, 9, frame, 1, 0, 0, frame, 0, 7, 0)
            yield begin + write(frame, 1, 3100, 0, frame, 4, 3, 0)
            yield begin + write(*(frame, 1, 900, 0) * 8, frame, 0, 2, 0)
            for most in BOUNDS:
                yield begin + write(head, 2, most.bytes * 16, 0) + write(padding, 900, 1, 7) * 3
                yield begin + write(head, 2, most.bytes * 16 + 1, 0)
            yield begin + write(*(frame, 0, 290, 0) * 5)
    begin = write(AS_IT_IS, greeting, 0, ready, 0, 0, 0)
    yield begin + write(frame, 1, 60_000, 0, frame, 0, 32_767, 0, frame, 0, 32_768, 1, 7)
    yield begin + write(*(frame, 0, 32_760, 1, 32_000) * 4)
    yield begin + write(*(frame, 4, 1024, 0) * 3, frame, 0, 0, 0, frame, 4, 1025, 0)
    yield write(0, anything, b"HTTP/1.1 200 OK\r\n" + bytes(100), 0)
    yield write(0, forged, 10, 2, 0)
    yield write(0, forged, 12, 65, 0)
    yield write(0, forged, 10, 4, 0, ready, 1, 0, 0, frame, 0, 7, 0)
    yield write(0, greeting, 0, frame, 0, 7, 0)
    yield write(0, greeting, 0, properties, 2, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, frame, 0, 1)
    yield write(0, greeting, 0, properties, 1, 0, 1, 0, 1)
    yield write(1, anything, GREETING + zmtp.ready("ROUTER", b"x") + b"\x00\x03abc\x01\x01a\x00\x01b", 0)
