"""Which requests the kernel has not answered yet: what a death report has to answer in its place.

A client may send any number of requests, and some that no kernel answers; the table is bounded. When it is
full, the oldest request that is not an `execute_request` goes; when there is none, the new one is not noted.
So the running cell, the oldest of its kind, is never the one that is forgotten. An id that a client uses
twice is two requests, and an answer to it is the older one's.

Which cell is running, and since when, is decided here and not by what the guest says: of those sent to one
shell (the main one, or a subshell) a cell has begun when it is sent to a shell that owes no other reply, or
when the one before it is answered. A kernel that has answered too early, and computes on, does so on the time
of the next cell.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from sandbox_kernel.relay.message import Request

EXECUTE = "execute_request"


@dataclass(eq=False)
class Unanswered:
    """A request.

    Attributes:
        request: what was asked.
        execution_count: the prompt number that the kernel gave it (0: it has not said).
        since: monotonic seconds since when it runs; None for a cell whose turn has not come, and for what is
            no cell.
    """

    request: Request
    execution_count: int = 0
    since: float | None = None


class CellWatcher(Protocol):
    """Who wants to know of cells."""

    def began(self, cell: Unanswered) -> None:
        """It is this cell's turn from now on."""

    def ended(self, cell: Unanswered) -> None:
        """A cell that had begun was answered."""


class PendingRequests:
    """The bounded table."""

    def __init__(self, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `limit` requests; `clock` tells the seconds for `since`."""
        self._limit = limit
        self._clock = clock
        self._executions: list[Unanswered] = []
        self._others: list[Unanswered] = []
        self.watchers: list[CellWatcher] = []

    def __len__(self) -> int:
        return len(self._executions) + len(self._others)

    def __iter__(self) -> Iterator[Unanswered]:
        """Executions first, each kind in the order of arrival."""
        return chain(tuple(self._executions), tuple(self._others))

    @property
    def running(self) -> list[Unanswered]:
        """The cells that have begun."""
        return [cell for cell in self._executions if cell.since is not None]

    def asked(self, request: Request) -> None:
        """A request went to the kernel."""
        is_cell = request.kind == EXECUTE
        table = self._executions if is_cell else self._others
        if len(self) >= self._limit:
            if not self._others:
                return
            del self._others[0]
        asked = Unanswered(request)
        idle = is_cell and not any(self._of_shell(request))
        table.append(asked)
        if idle:
            self._begin(asked)

    def answered(self, channel: str, identities: tuple[bytes, ...], message_id: str) -> None:
        """The kernel answered; of no consequence when nobody asked."""
        asked = (message_id, channel, identities)
        cell = _take(self._executions, asked)
        if cell is None:
            _take(self._others, asked)
            return
        if cell.since is None:
            return
        for watcher in self.watchers:
            watcher.ended(cell)
        following = next(self._of_shell(cell.request), None)
        if following is not None:
            self._begin(following)

    def counted(self, message_id: str, execution_count: int) -> None:
        """The kernel began to execute a request and gave it its prompt number."""
        for unanswered in self._executions:
            if unanswered.request.id == message_id:
                unanswered.execution_count = execution_count
                return

    def forget(self) -> None:
        """Everybody has been answered."""
        for cell in self.running:
            for watcher in self.watchers:
                watcher.ended(cell)
        self._executions.clear()
        self._others.clear()

    def _of_shell(self, request: Request) -> Iterator[Unanswered]:
        """Cells sent to the same shell, oldest first."""
        return (
            cell
            for cell in self._executions
            if cell.request.channel == request.channel and cell.request.subshell == request.subshell
        )

    def _begin(self, cell: Unanswered) -> None:
        cell.since = self._clock()
        for watcher in self.watchers:
            watcher.began(cell)


def _take(table: list[Unanswered], asked: tuple[str, str, tuple[bytes, ...]]) -> Unanswered | None:
    """Strikes the oldest of these off: the id, the channel, and who asked."""
    for index, unanswered in enumerate(table):
        request = unanswered.request
        if (request.id, request.channel, request.identities) == asked:
            return table.pop(index)
    return None
