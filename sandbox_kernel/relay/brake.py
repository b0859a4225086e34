"""Has a kernel wait that publishes faster than its `message_rate`; nothing of it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from sandbox_kernel.relay.outputs import Pace

_BACKLOG: Final = 1000
"""Messages that may be on their way from a kernel: what it keeps, and what its socket and ours hold."""


class Brake:
    """Holds the guest's output as long as it is ahead of its pace."""

    def __init__(self, rate: float, hold: Callable[[bool], None]) -> None:
        """At most `rate` messages a second (0: any number); `hold` has the guest wait, or go on."""
        self._pace = Pace(rate)
        self._hold = hold
        self._waits = False

    def published(self) -> None:
        """A message has come."""
        if not self._pace.rate:
            return
        delay = self._pace.delay(asyncio.get_running_loop().time())
        if delay > 0 and not self._waits:
            self._waits = True
            self._hold(True)
            self._go_on_after(delay)

    def hasten(self) -> None:
        """Lets what has been published already pass at once."""
        if self._pace.rate:
            self._pace.grant(_BACKLOG)
            self._waits = False
            self._hold(False)

    def _go_on_after(self, delay: float) -> None:
        loop = asyncio.get_running_loop()

        def go_on() -> None:
            # What had been read already was still to be passed on, and has made the wait longer.
            left = self._pace.left(loop.time())
            if left > 0:
                self._go_on_after(left)
            else:
                self._waits = False
                self._hold(False)

        loop.call_later(delay, go_on)
