"""What a program says on standard error: kept for a sentence about its end, and never waited for.

Nobody reads while the program runs. What the pipe has no room for (64 KiB, pipe(7)) is lost, and the program
is told so at once (EAGAIN): a guest that has it complain without end does not stop it.
"""

from __future__ import annotations

import os

_MOST = 65536


class Words:
    """One program's standard error."""

    def __init__(self) -> None:
        """Has a pipe."""
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    @property
    def end(self) -> int:
        """The program's end."""
        return self._writer

    def begun(self) -> None:
        """The program has its end, which is no more ours."""
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def take(self) -> str:
        """What it has said since the last time, on one line; empty for nothing."""
        try:
            said = os.read(self._reader, _MOST)
        except BlockingIOError:
            return ""
        text = said.decode("utf-8", "replace")
        return " | ".join(line for line in text.split("\n") if line.isprintable() and line)

    def close(self) -> None:
        """Forgets it; idempotent."""
        self.begun()
        if self._reader >= 0:
            os.close(self._reader)
            self._reader = -1
