"""One end of a ZMTP connection to the guest, as pure protocol: bytes in, messages out, no I/O.

Theory of operation. The guest is hostile, and libzmq is not made for that: its high-water marks count whole
messages, so a message whose frames never end fills the host's memory before anybody can look at it. Towards
the guest the relay therefore speaks ZMTP itself, where every length is known before it is believed.

ZMTP 3.0 (ZeroMQ RFC 23), mechanism NULL, in short:

    greeting    64 bytes: FF ........ 7F, version 3.0, mechanism (20 bytes, zero padded), as-server, filler
    handshake   one command READY each way with the properties Socket-Type and Identity
    traffic     frames: flags (1: more follow, 2: length in 8 bytes, 4: command), length, body

A subscription is a message of one frame, 01 and the topic. Saying version 3.0 keeps the peer from 3.1's
commands; a command in traffic is ignored, as the RFC asks.

Rules of this file: nothing is allocated for a length that is over a bound; a message's frames and bytes are
summed up while they arrive; what the guest does wrong is a GuestProtocolError and the end of the connection;
a large frame is read into its own memory, without a copy, and that memory is only claimed as it fills.

A message that is merely larger than one may be is no fault of the protocol, as users' data may be large: from
the frame on that goes too far, nothing of it is kept, and its end is told (`LeftOut`). Beyond `_FAULT` times
the bound it is one.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sandbox_kernel.errors import GuestProtocolError

Frame = bytes | memoryview
"""Small frames are bytes; large ones are views of memory of their own."""

SUBSCRIBE_ALL: Final = b"\x01"

_MORE: Final = 1
_LONG: Final = 2
_COMMAND: Final = 4
_GREETING: Final = 64
_COMMAND_BYTES: Final = 1024
_BUFFER: Final = 64 * 1024
_DIRECT: Final = _BUFFER // 2
"""Frames from this size on are read into memory of their own."""
_LAZY: Final = 1 << 20
"""From here on memory comes from mmap, which claims a page only when it is written."""


_FAULT: Final = 16


@dataclass(frozen=True)
class Bounds:
    """What one message may have: bytes (all frames together) and frames."""

    bytes: int
    frames: int


@dataclass(frozen=True)
class LeftOut:
    """A message that was too large: its first frames, up to the one that went too far, and all its bytes."""

    frames: list[Frame]
    size: int


def greeting() -> bytes:
    """What each side sends first (RFC 23, "Greeting")."""
    return b"\xff" + bytes(7) + b"\x01\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)


def ready(socket_type: str, identity: bytes) -> bytes:
    """The handshake's command of the NULL mechanism (RFC 23, "The NULL Security Mechanism")."""
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", socket_type.encode()), (b"Identity", identity)):
        body += bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
    return bytes([_COMMAND, len(body)]) + body


def encode(frames: Sequence[Frame]) -> list[Frame]:
    """A message as bytes to write; large frames stay what they are, small ones are joined."""
    pieces: list[Frame] = []
    small = bytearray()
    last = len(frames) - 1
    for index, frame in enumerate(frames):
        length = len(frame)
        more = _MORE if index < last else 0
        if length < 256:
            small += bytes((more, length))
        else:
            small.append(more | _LONG)
            small += length.to_bytes(8, "big")
        if length < _DIRECT:
            small += frame
        else:
            pieces += (bytes(small), frame)
            small.clear()
    if small:
        pieces.append(bytes(small))
    return pieces


class Reader:
    """Turns the guest's bytes into messages.

    Read into what `space` returns, then tell `received` how many bytes came.
    """

    def __init__(self, channel: str, peers: Iterable[str], bounds: Bounds) -> None:
        """`channel` is for error messages; `peers` are the socket types that the guest may have."""
        self.greeted = False
        """The peer's greeting has come; only now may READY be sent to it."""
        self.ready = False
        """The handshake has succeeded; only now may messages be sent."""
        self._channel = channel
        self._peers = frozenset(peers)
        self.bounds = bounds
        """Of a message; may be changed between two."""
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._frames: list[Frame] = []
        self._size = 0
        self._number = 0
        self._flags = 0
        self._skip = 0
        self._leaves_out = False
        self._large: memoryview | None = None
        self._filled = 0

    def space(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._large is not None:
            return self._large[self._filled :]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start and _BUFFER - self._end < _DIRECT + 16:
            held = self._end - self._start
            self._buffer[:held] = self._buffer[self._start : self._end]
            self._start, self._end = 0, held
        return self._view[self._end :]

    def received(self, count: int) -> list[list[Frame] | LeftOut]:
        """Takes note of `count` new bytes in `space`.

        Returns:
            The messages that are complete now.

        Raises:
            GuestProtocolError: the guest broke ZMTP or a bound; the connection is of no more use.
        """
        messages: list[list[Frame] | LeftOut] = []
        if self._large is None:
            self._end += count
        else:
            self._filled += count
            if self._filled < len(self._large):
                return messages
            self._complete(self._large, messages)
            self._large = None
        if self.greeted or self._take_greeting():
            self._take_frames(messages)
        return messages

    def _take_greeting(self) -> bool:
        if self._end < _GREETING:
            return False
        got = bytes(self._buffer[:_GREETING])
        if got[0] != 0xFF or got[9] != 0x7F or got[10] < 3:
            raise self._error("it does not speak ZMTP 3")
        if got[12:32] != b"NULL".ljust(20, b"\0"):
            raise self._error("its security mechanism is not NULL")
        self._start = _GREETING
        self.greeted = True
        return True

    def _take_frames(self, messages: list[list[Frame] | LeftOut]) -> None:
        buffer, view, start, end = self._buffer, self._view, self._start, self._end
        if self._skip:
            start += self._pass_over(end - start, messages)
        while end - start >= 2:
            flags = buffer[start]
            if flags & _LONG:
                if end - start < 9:
                    break
                length = int.from_bytes(view[start + 1 : start + 9], "big")
                body = start + 9
            else:
                length = buffer[start + 1]
                body = start + 2
            self._admit(flags, length)
            if self._leaves_out:
                self._flags, self._skip = flags, length
                start = body + self._pass_over(end - body, messages)
            elif end - body >= length:
                start = body + length
                self._flags = flags
                self._complete(bytes(view[body:start]), messages)
            elif length >= _DIRECT:
                self._flags = flags
                self._large = self._memory(length)
                self._filled = end - body
                self._large[: self._filled] = view[body:end]
                start = end
                break
            else:
                break
        self._start = start

    def _admit(self, flags: int, length: int) -> None:
        """Refuses a frame by its head, before anything is kept for it."""
        if flags > 7 or (flags & _COMMAND and flags & _MORE):
            raise self._error(f"a frame has the flags {flags:#04x}")
        if flags & _COMMAND:
            if length > _COMMAND_BYTES:
                raise self._error(f"a command has {length} bytes (limit {_COMMAND_BYTES})")
            if self._number:
                raise self._error("a command stands inside a message")
        elif not self.ready:
            raise self._error("a message stands before the handshake's end")
        elif self._number >= self.bounds.frames:
            raise self._error(f"a message has more than {self.bounds.frames} frames")
        elif self._size + length > self.bounds.bytes:
            if self._size + length > self.bounds.bytes * _FAULT:
                raise self._error(f"a message has more than {self.bounds.bytes * _FAULT} bytes")
            self._leaves_out = True

    def _pass_over(self, available: int, messages: list[list[Frame] | LeftOut]) -> int:
        """Takes no note of a frame's bytes; returns how many of those available are its."""
        passed = min(available, self._skip)
        self._skip -= passed
        self._size += passed
        if not self._skip:
            self._number += 1
            if not self._flags & _MORE:
                messages.append(LeftOut(self._frames, self._size))
                self._begin_message()
        return passed

    def _begin_message(self) -> None:
        self._frames = []
        self._size = self._number = 0
        self._leaves_out = False

    def _complete(self, body: Frame, messages: list[list[Frame] | LeftOut]) -> None:
        if self._flags & _COMMAND:
            if not self.ready:
                self._take_ready(bytes(body))
            return
        self._frames.append(body)
        self._size += len(body)
        self._number += 1
        if not self._flags & _MORE:
            messages.append(self._frames)
            self._begin_message()

    def _take_ready(self, body: bytes) -> None:
        if not body.startswith(b"\x05READY"):
            raise self._error("its first command is not READY")
        properties: dict[bytes, bytes] = {}
        rest = body[6:]
        while rest:
            name, rest = rest[1 : 1 + rest[0]], rest[1 + rest[0] :]
            size = int.from_bytes(rest[:4], "big")
            if len(rest) < 4 + size:
                raise self._error("its READY command is cut off")
            properties[name.lower()], rest = rest[4 : 4 + size], rest[4 + size :]
        peer = properties.get(b"socket-type", b"").decode("ascii", "replace")
        if peer not in self._peers:
            raise self._error(f"its socket is {peer[:16]!r}, not {' or '.join(sorted(self._peers))}")
        self.ready = True

    def _error(self, what: str) -> GuestProtocolError:
        return GuestProtocolError(f"The guest broke the protocol of channel {self._channel}: {what}.")

    def _memory(self, length: int) -> memoryview:
        try:
            return memoryview(bytearray(length) if length < _LAZY else mmap.mmap(-1, length))
        except (OSError, MemoryError):
            raise self._error(f"a frame has {length} bytes, for which this host has no memory") from None
