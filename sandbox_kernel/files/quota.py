"""What a guest writes through a mount, counted and bounded: 9p2000.L read as far as that takes. Pure.

A message is size[4] type[1] tag[2] and a body, little-endian; `size` counts all of it. The client (the guest)
asks, the server answers with the same tag. Sources: 9P2000.L as Linux speaks it (include/net/9p/9p.h) and the
protocol description that comes with diod (protocol.md).

Rules. A message is either passed on whole or answered here with Rlerror, never changed. What is counted is
what the guest asks for, whether or not the server does it: no answer has to be awaited, and nobody gains by
asking for what fails. A message that no client would send ends the mount.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox_kernel.errors import GuestProtocolError

HEADER = struct.Struct("<IBH")
"""Size, type, tag."""
_RLERROR, _SETATTR, _WRITE = 7, 26, 118
_MAKERS = {14: "Tlcreate", 16: "Tsymlink", 18: "Tmknod", 70: "Tlink", 72: "Tmkdir"}
"""Requests that make a directory entry."""
_WRITE_HEAD = struct.Struct("<IQI")
"""fid, offset, count."""
_SETATTR_HEAD = struct.Struct("<IIIIIQ")
"""fid, valid, mode, uid, gid, size."""
_SETS_SIZE = 8
"""In `valid`."""
_FARTHEST = 1 << 63


@dataclass
class Quota:
    """What is left of one mount's bounds.

    Attributes:
        written: bytes that may still be written; None: any number.
        files: entries that may still be made; None: any number.
    """

    written: int | None
    files: int | None

    @classmethod
    def of(cls, written: int, files: int) -> Quota:
        """The bounds of a mount, where 0 is none."""
        return cls(written or None, files or None)

    def refuse(self, message: bytes | bytearray | memoryview) -> bytes | None:
        """The answer to a guest's message that goes over a bound, None for one that is to be passed on.

        Args:
            message: a whole one.

        Raises:
            GuestProtocolError: it is shorter than its type.
        """
        size, kind, tag = HEADER.unpack_from(message)
        if kind == _WRITE:
            _, offset, count = _fields(_WRITE_HEAD, message)
            if count > size - HEADER.size - _WRITE_HEAD.size or offset + count >= _FARTHEST:
                raise GuestProtocolError(f"A write of {count} bytes came in a message of {size}.")
            if self.written is not None:
                if count > self.written:
                    return _error(tag, errno.EDQUOT)
                self.written -= count
        elif kind == _SETATTR:
            _, valid, _, _, _, length = _fields(_SETATTR_HEAD, message)
            if valid & _SETS_SIZE and self.written is not None and length > self.written:
                return _error(tag, errno.EDQUOT)  # larger than anything it could still write
        elif kind in _MAKERS and self.files is not None:
            if self.files == 0:
                return _error(tag, errno.EDQUOT)
            self.files -= 1
        return None


class Messages:
    """Cuts a stream into messages."""

    def __init__(self, longest: int) -> None:
        """Bytes of a message at most."""
        self._longest = longest
        self._data = bytearray()

    def receive(self, data: bytes | memoryview) -> Iterator[bytes]:
        """The messages that are complete with `data`.

        Raises:
            GuestProtocolError: a size that no message has.
        """
        self._data += data
        while len(self._data) >= HEADER.size:
            size = int.from_bytes(self._data[:4], "little")
            if not HEADER.size <= size <= self._longest:
                raise GuestProtocolError(
                    f"A message of 9p says it has {size} bytes; {HEADER.size} to {self._longest} may be."
                )
            if len(self._data) < size:
                return
            message = bytes(self._data[:size])
            del self._data[:size]
            yield message


def _fields(head: struct.Struct, message: bytes | bytearray | memoryview) -> tuple[int, ...]:
    if len(message) < HEADER.size + head.size:
        raise GuestProtocolError(f"A message of 9p has {len(message)} bytes, too few for its type.")
    return head.unpack_from(message, HEADER.size)


def _error(tag: int, code: int) -> bytes:
    """Rlerror: ecode[4]."""
    return HEADER.pack(HEADER.size + 4, _RLERROR, tag) + struct.pack("<I", code)
