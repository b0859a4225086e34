"""What a tree is written down with, and what is told of one: limits, what went wrong, how far a copy is."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

PIECE = 256 * 1024
"""Bytes of a file that travel, and are waited for, together."""
BROKEN = 0xFFFF0000
MAX_DEPTH = 100
"""Directories in each other."""
MAX_PROBLEMS = 50
"""Of what was left out, so many are named."""
LINK, SPECIAL, DEEP, TAKEN = 1000, 1001, 1002, 1003
"""Reasons beside errno's: it is a link, neither file nor directory, in more directories than MAX_DEPTH; where
it should go there is something that is neither."""

HEAD = struct.Struct(">cBHqQ")
LENGTH = struct.Struct(">I")
DIRECTORY, FILE, LEFT_OUT, UP, END = b"D", b"F", b"S", b"U", b"E"
MODE = 0o777
_LONGEST_PLACE = 1000


class WireError(Exception):
    """The peer hung up, or nothing goes or comes any more."""


class Spoken(Exception):
    """The peer has something to say before it was its turn."""


class FormatError(Exception):
    """What the peer sends is no tree."""


class Overflow(Exception):
    """There is more than the limits allow; `args[0]` is "size" or "entries"."""


class NoRoom(Exception):
    """The receiving file system is full; `args[0]` is errno's sentence."""


class Limits:
    """What a receiver takes: bytes of files; and files, directories and what is left out, together."""

    def __init__(self, size: int = 2**63 - 1, entries: int = 2**63 - 1) -> None:
        self.size, self.entries = size, entries


class Tally:
    """What has been copied so far, and what was left out.

    Attributes:
        files, directories: how many of each.
        size: bytes of files.
        expected: bytes that the only file has, as far as its sender knew; 0 for a directory.
        place: path, within the tree, of what is being copied.
        problems: place and reason of the first MAX_PROBLEMS that were left out.
        unlisted: how many more there are.
        failed: how many of all of them should have been copied, unlike links and special files.
    """

    def __init__(self) -> None:
        self.files = self.directories = self.size = self.expected = self.unlisted = self.failed = 0
        self.place = ""
        self.problems: list[tuple[str, int]] = []

    def leave_out(self, place: str, reason: int) -> None:
        """Notes that `place` is not copied."""
        self.failed += reason not in (LINK, SPECIAL)
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append((place[-_LONGEST_PLACE:], reason))
        else:
            self.unlisted += 1


Watch = Callable[[Tally], None]
"""Called now and then with how far a copy is; what it raises ends the copy."""


def reason_of(number: int) -> str:
    """Why something was left out, in words."""
    if number == LINK:
        return "is a link, which is not followed"
    if number == SPECIAL:
        return "is neither a file nor a directory"
    if number == DEEP:
        return f"lies in more than {MAX_DEPTH} directories"
    if number == TAKEN:
        return "has the name of a link, or of another thing that is no file, where it should go"
    return os.strerror(number)
