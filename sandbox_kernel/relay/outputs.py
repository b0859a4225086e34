"""What a kernel publishes, held against the limits of a cell's output and of its rate. Pure.

Whose output something is, is not for the guest to say: all that comes while a cell runs counts as that
cell's, whatever parent it names, and what comes between two cells as the last one's. What exceeds the limit
is left out, a stream's text is cut, and one notice says so; what tells of a cell's state passes, as far as it
is small. A kernel that publishes faster than `message_rate` waits, and loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sandbox_kernel.relay import message
from sandbox_kernel.relay.message import Author
from sandbox_kernel.relay.zmtp import Frame

MIB: Final = 1 << 20
MARK: Final = "[sandbox-kernel] "
"""Begins what is not the kernel's own output."""

_STATE: Final = (b"status", b"execute_input", b"error")
_SMALL: Final = 64 * 1024


class Allowance:
    """The bytes that may still be put out."""

    def __init__(self, limit: int) -> None:
        """`limit` is bytes for a cell; 0: any number."""
        self._limit = limit
        self._spent = 0
        self._told = False

    @property
    def limited(self) -> bool:
        """Whether there is a limit."""
        return self._limit > 0

    def renew(self) -> None:
        """A cell has begun, and no other one runs."""
        self._spent, self._told = 0, False

    def admit(self, frames: Sequence[Frame], at: int, author: Author, parent: bytes) -> list[Sequence[Frame]]:
        """What reaches the clients in the place of a message.

        Args:
            frames: the message, with its delimiter at `at`.
            author: who signs what is not the kernel's.
            parent: header of the cell that the notice is for.
        """
        size = sum(map(len, frames))
        left = self._limit - self._spent
        self._spent += size
        if size <= left:
            return [frames]
        if size <= _SMALL and any(message.is_kind(frames, at, kind) for kind in _STATE):
            return [frames]
        rest = _cut(frames, at, author, left) if left > 0 else []
        if not self._told:
            self._told = True
            limit = self._limit / MIB
            text = (
                f"The output limit of {limit:g} MiB a cell was reached, the rest of this cell's output is "
                "left out; put out less, or raise `output`."
            )
            rest.append(notice(text, author, parent))
        return rest


@dataclass
class Pace:
    """How fast messages may come: a bucket of tokens that fills at `rate` a second, and holds one second's.

    Attributes:
        rate: messages a second; 0: any number.
    """

    rate: float
    _tokens: float = 0.0
    _at: float = 0.0

    def delay(self, now: float) -> float:
        """A message came at the time `now` (monotonic seconds): seconds that the next one has to wait."""
        self._fill(now)
        self._tokens -= 1.0
        return self.left(now)

    def left(self, now: float) -> float:
        """Seconds that the next message has still to wait."""
        self._fill(now)
        return max(0.0, -self._tokens / self.rate)

    def _fill(self, now: float) -> None:
        self._tokens = min(max(self.rate, 1.0), self._tokens + (now - self._at) * self.rate)
        self._at = now


def too_large(size: int, limit: int) -> str:
    """What is said in the place of a message of `size` bytes, where `limit` are allowed."""
    return (
        f"The kernel sent a message of {size / MIB:.1f} MiB, and message_size allows {limit / MIB:g} MiB, so "
        "it was left out; show or send less at a time, or raise `message_size`."
    )


def notice(text: str, author: Author, parent: bytes) -> Sequence[Frame]:
    """A line that is not the kernel's, in the output of the cell whose header is `parent`."""
    content = {"name": "stderr", "text": f"{MARK}{text}\n"}
    return [author.topic("stream"), *author.message("stream", content, parent)]


def _cut(frames: Sequence[Frame], at: int, author: Author, size: int) -> list[Sequence[Frame]]:
    """The beginning of a stream's text, of about `size` bytes; nothing of anything else."""
    if not message.is_kind(frames, at, b"stream"):
        return []
    try:
        content = json.loads(bytes(frames[at + 5]))
        content["text"] = content["text"].encode()[:size].decode(errors="ignore") + "…\n"
        parts = [*map(bytes, frames[at + 2 : at + 5]), json.dumps(content).encode()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []
    return [[*frames[: at + 1], author.signer.sign(parts), *parts]]
