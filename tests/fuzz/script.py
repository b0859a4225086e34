"""A fuzzer's bytes read as a script: numbers and strings of bytes, as a target asks for them.

A number is one byte up to 247. 248 to 250 say that 2, 4 or 8 bytes (little-endian) follow; 251 to 254 stand
for what bounds are made of: 2**16, 2**31, 2**32 and 2**64, less the byte that follows; 255 is 2**63. A string
is its length and its bytes. What the script does not have any more is 0. So every string of bytes is a
script, small changes of it are small changes of what is done, and `write` is the inverse for seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_WIDTHS = {248: 2, 249: 4, 250: 8}
_BELOW = {251: 1 << 16, 252: 1 << 31, 253: 1 << 32, 254: 1 << 64}


class Script:
    """The bytes, and how far they are read."""

    __slots__ = ("_at", "_data", "_end")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self._end = len(data)

    def more(self) -> bool:
        """Whether there is anything left."""
        return self._at < self._end

    def number(self) -> int:
        """The next number, 0 to 2**64 - 1."""
        at = self._at
        if at >= self._end:
            return 0
        self._at = at + 1
        first = self._data[at]
        if first < 248:
            return first
        if first < 251:
            return int.from_bytes(self.bytes(_WIDTHS[first]), "little")
        if first < 255:
            return _BELOW[first] - 1 - int.from_bytes(self.bytes(1), "little")
        return 1 << 63

    def below(self, bound: int) -> int:
        """The next number, made smaller than `bound`."""
        return self.number() % bound

    def choose(self, options: Sequence[T]) -> T:
        """One of some."""
        return options[self.number() % len(options)]

    def bytes(self, count: int) -> bytes:
        """The next bytes, fewer at the end."""
        at = self._at
        self._at = min(at + count, self._end)
        return self._data[at : self._at]

    def string(self) -> bytes:
        """A string of bytes."""
        return self.bytes(self.number())


def write(*values: int | bytes) -> bytes:
    """The script that gives these numbers and strings."""
    return b"".join(map(_number, values))


def _number(value: int | bytes) -> bytes:
    if isinstance(value, bytes):
        return _number(len(value)) + value
    if value < 248:
        return bytes([value])
    for first, width in _WIDTHS.items():
        if value < 1 << 8 * width:
            return bytes([first]) + value.to_bytes(width, "little")
    raise ValueError(f"{value} is no number of a script")
