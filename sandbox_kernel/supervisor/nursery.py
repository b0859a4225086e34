"""Where a client gets its supervisors: the first starts an interpreter, the others are forked from a zygote.

A client that starts one kernel often starts more: a server, a test suite, a restart. So a moment after its
first kernel a client gets a zygote of its own, a child that ends with it. A supervisor that is forked there
is up in milliseconds instead of a tenth of a second, and shares with the others what they all have imported.

One nursery per process; usable from any thread. A forked child of a client has none of its parent's.
"""

from __future__ import annotations

import logging
import os
import threading

from sandbox_kernel.errors import HostError
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.surroundings import surroundings
from sandbox_kernel.supervisor.zygote import Zygote

log = logging.getLogger(__name__)

_AFTER = 1.0
"""Seconds after a first start before the zygote is: the first cells come first."""


class Nursery:
    """The supervisors of one client."""

    def __init__(self, after: float = _AFTER) -> None:
        """A nursery that gets its zygote `after` seconds from its first supervisor."""
        self._after = after
        self._zygote: Zygote | None = None
        self._timer: threading.Timer | None = None
        self._surroundings: dict[str, str] = {}
        self._turn = threading.Lock()

    def supervisor(self) -> SupervisorHandle:
        """A new supervisor.

        Raises:
            OSError: no process can be started.
        """
        with self._turn:
            mine = surroundings()
            if self._zygote is not None and self._surroundings == mine:
                try:
                    return self._zygote.supervisor()
                except HostError as error:
                    log.warning("%s", error)
            self._close()
            self._surroundings = mine
            if self._timer is None:
                self._timer = threading.Timer(self._after, self._start)
                self._timer.daemon = True
                self._timer.start()
        return SupervisorHandle.spawn()

    def warm(self) -> None:
        """Gets the zygote now, for a client that knows that it will start kernels."""
        with self._turn:
            self._surroundings = surroundings()
        self._start()

    def close(self) -> None:
        """Ends the zygote; the supervisors go on, and a later one begins anew."""
        with self._turn:
            self._close()

    def _start(self) -> None:
        with self._turn:
            self._timer = None
            if self._zygote is None and self._surroundings == surroundings():
                try:
                    self._zygote = Zygote()
                except OSError as error:
                    log.warning("this client's supervisors start an interpreter each (%s)", error)

    def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._zygote is not None:
            self._zygote.close()
            self._zygote = None

    def forget(self) -> None:
        """Begins anew with nothing, as a forked child has to: the zygote is its parent's."""
        self._turn = threading.Lock()
        self._surroundings = {}
        self._timer = None
        if self._zygote is not None:
            self._zygote.forget()
            self._zygote = None


nursery = Nursery()
"""This process's own."""
os.register_at_fork(after_in_child=nursery.forget)
