"""Where a client gets its supervisors: the first starts an interpreter, the others are forked from a zygote.

A client that starts one kernel often starts more: a server, a test suite, a restart. So a moment after its
first kernel a client gets a zygote of its own, a child that ends with it. A supervisor that is forked there
is up in milliseconds instead of a tenth of a second, and shares with the others what they all have imported.

And the next VM like the last one is then begun: its supervisor waits with a QEMU that has loaded the
template, a guest that has not run since it was saved, and some 25 MiB. It ends with the client, or when
nobody has wanted it for a while.

One nursery per process; usable from any thread. A forked child of a client has none of its parent's.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from sandbox_kernel.errors import HostError, SandboxKernelError
from sandbox_kernel.spec import VMSpec
from sandbox_kernel.supervisor.control import PrepareRequest
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.surroundings import surroundings
from sandbox_kernel.supervisor.zygote import Zygote

log = logging.getLogger(__name__)

_AFTER = 1.0
"""Seconds after a start before zygote and next VM are made: the first cells come first."""
_KEEP = 300.0
"""Seconds that a VM waits for a kernel."""


@dataclass(frozen=True)
class _Waiting:
    """A VM that waits for a kernel.

    Attributes:
        shape: what it is; see `VMSpec.shape`.
        handle: its supervisor's.
        surroundings: for whom it was made.
    """

    shape: VMSpec
    handle: SupervisorHandle
    surroundings: dict[str, str] = field(repr=False)

    def end(self) -> None:
        """Ends it and waits until it is cleaned up."""
        self.handle.kill()
        self.handle.wait()


class Nursery:
    """The supervisors of one client."""

    def __init__(self, after: float = _AFTER, keep: float = _KEEP) -> None:
        """A nursery that looks ahead `after` seconds after a start, for `keep` seconds."""
        self._after, self._keep = after, keep
        self._turn = threading.Lock()  # never held while anybody is waited for
        self._looking = threading.Lock()  # one looks ahead at a time
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._zygote: Zygote | None = None
        self._waiting: _Waiting | None = None
        self._coming: SupervisorHandle | None = None
        self._next: VMSpec | None = None
        self._ahead: threading.Timer | None = None
        self._expiry: threading.Timer | None = None
        self._surroundings: dict[str, str] = {}

    def supervisor(self) -> SupervisorHandle:
        """A new supervisor.

        Raises:
            OSError: no process can be started.
        """
        mine = surroundings()
        with self._turn:
            zygote = self._zygote if self._surroundings == mine else None
        if zygote is not None:
            try:
                return zygote.supervisor()
            except HostError as error:
                log.warning("%s", error)
        self.close()
        with self._turn:
            self._surroundings = mine
            self._ahead = self._later(self._ahead, self._after, self._look_ahead)
        return SupervisorHandle.spawn()

    def waiting(self, spec: VMSpec) -> SupervisorHandle | None:
        """A supervisor that waits with a VM for `spec`, from now on the caller's; None without one."""
        with self._turn:
            found, self._waiting = self._waiting, None
        if found is None:
            return None
        fits = (found.shape, found.surroundings) == (spec.shape, surroundings())
        if fits and found.handle.poll() is None:
            return found.handle
        found.end()
        return None

    def expect(self, spec: VMSpec) -> None:
        """A kernel has been started for `spec`; the next one may well be like it."""
        with self._turn:
            self._next = spec if spec.start == "auto" else None
            self._ahead = self._later(self._ahead, self._after, self._look_ahead)

    def warm(self, spec: VMSpec | None = None) -> None:
        """Gets the zygote, and a VM for `spec`, for a client that knows that it will start kernels.

        Returns when they are there, whoever began them, or cannot be had, which is logged.
        """
        with self._turn:
            self._surroundings = surroundings()
            self._next = spec
        self._look_ahead()

    def close(self) -> None:
        """Ends the zygote and what waits; the other supervisors go on, and a later one begins anew."""
        with self._turn:
            waiting, coming, zygote = self._waiting, self._coming, self._zygote
            for timer in (self._ahead, self._expiry):
                if timer is not None:
                    timer.cancel()
            self._begin_anew()
        if coming is not None:
            coming.kill()  # whoever has it made collects it
        if waiting is not None:
            waiting.end()
        if zygote is not None:
            zygote.close()

    def forget(self) -> None:
        """Begins anew with nothing, as a forked child has to: all there is is its parent's."""
        if self._waiting is not None:
            self._waiting.handle.forget()
        if self._coming is not None:
            self._coming.forget()
        if self._zygote is not None:
            self._zygote.forget()
        self._turn = threading.Lock()
        self._looking = threading.Lock()
        self._begin_anew()

    def _later(
        self, before: threading.Timer | None, seconds: float, call: Callable[[], None]
    ) -> threading.Timer:
        """Has `call` called in `seconds`, instead of what `before` was to do."""
        if before is not None:
            before.cancel()
        timer = threading.Timer(seconds, call)
        timer.daemon = True
        timer.start()
        return timer

    def _look_ahead(self) -> None:
        """Gets the zygote, and the VM that is expected next."""
        with self._looking:
            self._get_what_is_next()

    def _get_what_is_next(self) -> None:
        mine = surroundings()
        with self._turn:
            if self._surroundings != mine:
                return
            try:
                self._zygote = zygote = self._zygote or Zygote()
            except OSError as error:
                log.warning("this client's supervisors start an interpreter each (%s)", error)
                return
            spec = self._next
            if spec is None or self._waiting is not None:
                return
        try:
            handle = zygote.supervisor()
        except HostError as error:
            log.warning("%s", error)
            return
        made = _Waiting(spec.shape, handle, mine)
        with self._turn:
            wanted = self._zygote is zygote
            if wanted:
                self._coming = handle
        if wanted:
            try:
                handle.prepare(PrepareRequest(f"s{os.urandom(5).hex()}", spec, asleep=True))
            except SandboxKernelError as error:
                log.info("no VM waits for the next kernel: %s", error)
                wanted = False
            with self._turn:
                wanted = wanted and self._coming is handle
                if self._coming is handle:
                    self._coming = None
                if wanted:
                    self._waiting = made
                    self._expiry = self._later(self._expiry, self._keep, self._give_up)
        if not wanted:
            made.end()

    def _give_up(self) -> None:
        with self._turn:
            found, self._waiting = self._waiting, None
        if found is not None:
            found.end()


nursery = Nursery()
"""This process's own."""
os.register_at_fork(after_in_child=nursery.forget)
