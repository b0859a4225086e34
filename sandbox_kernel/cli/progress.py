"""Shows what is being done: a spinner and a clock on a terminal, plain lines elsewhere, durations at the end.

Everything goes to standard error, so that standard output stays what a program can read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from sandbox_kernel.agent.answers import plain
from sandbox_kernel.agent.tree import Tally, Watch

_TITLE = 40
"""Characters of what is being copied."""


class Steps:
    """Shows steps while they run and remembers how long each took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._taken: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Shows `title` until the work inside has ended."""
        began = time.monotonic()
        with self._shown(title):
            yield
        seconds = time.monotonic() - began
        self._taken.append((title, seconds))
        self._console.print(f"{title}: {seconds:.1f} s", highlight=False, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """One sentence that stays on the screen."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def summary(self) -> None:
        """How long each step took; nothing if there was none."""
        if not self._taken:
            return
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column()
        table.add_column(justify="right")
        for title, seconds in [*self._taken, ("all together", sum(seconds for _, seconds in self._taken))]:
            table.add_row(title, f"{seconds:.1f} s")
        self._console.print()
        self._console.print(table)

    @contextlib.contextmanager
    def _shown(self, title: str) -> Iterator[None]:
        if not self._console.is_terminal:
            self._console.print(f"{title} …", highlight=False, markup=False, soft_wrap=True)
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            progress.add_task(title, total=None)
            yield


@contextlib.contextmanager
def transfer(console: Console, title: str) -> Iterator[Watch | None]:
    """Shows how far a copy is, by what it yields; yields None where there is no terminal to show it on."""
    if not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(plain(title, _TITLE), total=None)

        def show(tally: Tally) -> None:
            progress.update(
                task,
                description=plain(tally.place or title, _TITLE),
                # A file may grow meanwhile, or its size be a guest's lie.
                total=max(tally.expected, tally.size) if tally.expected else None,
                completed=tally.size,
            )

        yield show
