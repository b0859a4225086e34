"""An event loop that does nothing by itself: `run` calls what it was told to call, and time stands still.

It has what the code under test asks of a loop, no more. A callback that was to be called later is called when
`pass_time` says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MOST_TURNS = 60


class Future:
    """A promise; nobody waits for it."""

    def __init__(self) -> None:
        self.value: Any = None
        self._done = False

    def done(self) -> bool:
        return self._done

    def result(self) -> Any:
        assert self._done
        return self.value

    def set_result(self, value: object) -> None:
        assert not self._done, "a promise is kept once"
        self.value, self._done = value, True


class Loop:
    """The loop of one run."""

    def __init__(self) -> None:
        self.readers: dict[int, Callable[[], None]] = {}
        self.stirred: set[int] | None = None
        """The files to which something has happened; when None, it may have to all."""
        self.now = 0.0
        self._soon: list[Callable[[], None]] = []
        self._later: list[tuple[float, Callable[[], None]]] = []

    def create_future(self) -> Future:
        return Future()

    def time(self) -> float:
        return self.now

    def add_reader(self, number: int, callback: Callable[[], None]) -> None:
        assert number not in self.readers
        self.readers[number] = callback

    def remove_reader(self, number: int) -> None:
        del self.readers[number]

    def call_soon(self, callback: Callable[[], None]) -> None:
        self._soon.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self._later.append((self.now + delay, callback))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        due = [callback for when, callback in self._later if when <= self.now]
        self._later = [(when, callback) for when, callback in self._later if when > self.now]
        self._soon += due

    def run(self) -> None:
        """Calls what may be readable and what was asked for, until nothing is asked for any more."""
        for _ in range(MOST_TURNS):
            soon, self._soon = self._soon, []
            for number, callback in tuple(self.readers.items()):
                if number in self.readers and (self.stirred is None or number in self.stirred):
                    callback()
            for callback in soon:
                callback()
            if not self._soon:
                return
        raise AssertionError("it does not come to rest")


@contextmanager
def running() -> Iterator[Loop]:
    """A loop that counts as the running one."""
    loop = Loop()
    asyncio._set_running_loop(loop)  # type: ignore[arg-type]
    try:
        yield loop
    finally:
        asyncio._set_running_loop(None)
