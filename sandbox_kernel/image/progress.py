"""How long-running work tells somebody what it is doing, without knowing whether that is a terminal.

Work is a row of named steps. Whoever shows them (the command line, a test, nobody) implements `Progress`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol


class Progress(Protocol):
    """Somebody who is told what is being done."""

    def step(self, title: str) -> AbstractContextManager[None]:
        """Surrounds one piece of work; `title` completes "now:"."""

    def note(self, text: str) -> None:
        """One sentence that the user should read."""


class Silent:
    """Tells nobody."""

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Does nothing around the work."""
        yield

    def note(self, text: str) -> None:
        """Drops the sentence."""
