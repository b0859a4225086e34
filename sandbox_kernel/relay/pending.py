"""Which requests the kernel has not answered yet: what a death report has to answer in its place.

A client may send any number of requests, and some that no kernel answers; the table is bounded. When it is
full, the oldest request that is not an `execute_request` goes; when there is none, the new one is not noted.
So the running cell, the oldest of its kind, is never the one that is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from sandbox_kernel.relay.message import Request

EXECUTE = "execute_request"

_Key = tuple[str, tuple[bytes, ...], str]


@dataclass
class Unanswered:
    """A request, and the prompt number that the kernel gave it (0: it has not begun)."""

    request: Request
    execution_count: int = 0


class PendingRequests:
    """The bounded table."""

    def __init__(self, limit: int) -> None:
        """At most `limit` requests."""
        self._limit = limit
        self._executions: dict[_Key, Unanswered] = {}
        self._others: dict[_Key, Unanswered] = {}

    def __len__(self) -> int:
        return len(self._executions) + len(self._others)

    def __iter__(self) -> Iterator[Unanswered]:
        """Executions first, each kind in the order of arrival."""
        return chain(tuple(self._executions.values()), tuple(self._others.values()))

    def asked(self, request: Request) -> None:
        """A request went to the kernel."""
        table = self._executions if request.kind == EXECUTE else self._others
        if len(self) >= self._limit:
            if not self._others:
                return
            del self._others[next(iter(self._others))]
        table[request.channel, request.identities, request.id] = Unanswered(request)

    def answered(self, channel: str, identities: tuple[bytes, ...], message_id: str) -> None:
        """The kernel answered; of no consequence when nobody asked."""
        key = (channel, identities, message_id)
        if self._executions.pop(key, None) is None:
            self._others.pop(key, None)

    def counted(self, message_id: str, execution_count: int) -> None:
        """The kernel began to execute a request and gave it its prompt number."""
        for (_, _, asked), unanswered in self._executions.items():
            if asked == message_id:
                unanswered.execution_count = execution_count
                return
