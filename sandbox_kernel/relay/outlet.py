"""What waits for slow clients on one channel, in bytes: when the guest must wait, and when a client is cut.

Theory of operation. libzmq counts messages, not bytes: 4096 messages of 20 MB that a stalled client does not
take would be the end of the host. Small frames are copied by libzmq and bounded by that count; large ones are
handed over without a copy, and their release tells when no client needs them any more. Their sum is what this
file watches:

    sum ≤ limit                    all is well
    sum > limit                    the guest waits (its messages stay in the guest) until sum ≤ limit / 2
    … and no release for `stall`   the connections that take nothing are cut, which frees what they held

So a client that is merely slow slows the guest, as a full pipe does, but only when it is far behind; one that
has stopped costs the others at most `stall` seconds for each `limit` bytes.

What a guest does that has to wait is its own affair: a kernel whose iopub is an XPUB with ZMQ_XPUB_NODROP
waits and loses nothing; a stock one, whose XPUB keeps 1000 messages, drops what it makes beyond those during
the wait, as it does towards any slow subscriber.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class Verdict(Enum):
    """What to do about the clients of a channel."""

    FLOW = "go on"
    WAIT = "let the guest wait"
    CUT = "cut the connections that take nothing"


@dataclass
class Outlet:
    """The large frames on their way to clients.

    Attributes:
        limit: bytes that may wait.
        stall: seconds without a release after which the connections in the way are cut.
    """

    limit: int
    stall: float
    _waiting: deque[tuple[int, Callable[[], bool]]] = field(default_factory=deque)
    _sum: int = 0
    _held: bool = False
    _moved: float = 0.0

    def sent(self, size: int, released: Callable[[], bool]) -> None:
        """A large frame was handed to libzmq; `released` tells when no client needs it any more."""
        self._waiting.append((size, released))
        self._sum += size

    def verdict(self, now: float) -> Verdict:
        """What to do at the time `now` (monotonic seconds); asked after each `sent` and while it waits."""
        if self._sum <= self.limit and not self._held:
            return Verdict.FLOW
        before = self._sum
        self._waiting = deque(entry for entry in self._waiting if not entry[1]())
        self._sum = sum(size for size, _ in self._waiting)
        if self._sum <= (self.limit // 2 if self._held else self.limit):
            self._held = False
            return Verdict.FLOW
        if not self._held or self._sum < before:
            self._moved = now
        self._held = True
        if now - self._moved >= self.stall:
            self._moved = now
            return Verdict.CUT
        return Verdict.WAIT
