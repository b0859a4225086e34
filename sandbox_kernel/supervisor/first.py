"""A supervisor's first request: read from its socket and begun, before anything large is imported."""

from __future__ import annotations

import os
import resource
import socket
from dataclasses import dataclass, field

from sandbox_kernel.errors import ConfigurationError, SandboxKernelError
from sandbox_kernel.supervisor.beginning import Beginning, begin
from sandbox_kernel.supervisor.control import MAX_LINE, LaunchRequest, PrepareRequest, from_line
from sandbox_kernel.supervisor.decision import decide_now
from sandbox_kernel.trace import Trace

_NOFILE = 1024


@dataclass
class Begun:
    """What has come of a request.

    Attributes:
        trace: phases so far.
        beginning: the VM; None when `error` says why there is none.
        error: what went wrong.
    """

    trace: Trace
    beginning: Beginning | None = None
    error: SandboxKernelError | OSError | None = None

    def take(self) -> Beginning:
        """The VM.

        Raises:
            SandboxKernelError, OSError: there is none.
        """
        if self.beginning is None:
            assert self.error is not None
            raise self.error
        return self.beginning

    def turn(self) -> None:
        """Does for QEMU what it waits for; to be called now and then until an event loop does it."""
        lender = self.beginning.ignition.powered.spawned.lender if self.beginning is not None else None
        if lender is not None:
            lender.turn()


@dataclass
class First:
    """The first request.

    Attributes:
        line: the request as it came; empty when the client went away instead.
        begun: what has come of it; None when that is for the event loop to do.
        asleep: whether the guest is not to run yet.
    """

    line: bytes
    begun: Begun | None = field(default=None)
    asleep: bool = False


def confine() -> None:
    """What this process may take itself; QEMU inherits it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    limit = _NOFILE if hard == resource.RLIM_INFINITY else min(_NOFILE, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


def receive(control_fd: int) -> First:
    """Waits for the first request and begins what it asks for."""
    line = _read_line(control_fd)
    if not line:
        return First(line)
    try:
        message = from_line(line)
        kind = PrepareRequest if message.get("op") == "prepare" else LaunchRequest
        request = kind.from_message(message)
    except ConfigurationError:
        return First(line)  # whose answer it is that says what is wrong
    trace = Trace(getattr(request, "began", None))
    trace.mark("supervisor runs")
    try:
        decision = decide_now(request.spec)
        if decision is None:
            return First(line)
        asleep = getattr(request, "asleep", False)
        return First(line, Begun(trace, begin(request.id, decision, control_fd, trace, asleep)), asleep)
    except (SandboxKernelError, OSError) as error:
        return First(line, Begun(trace, error=error))


def _read_line(control_fd: int) -> bytes:
    """One line, and not a byte more: the rest is the event loop's."""
    line = b""
    with socket.socket(fileno=os.dup(control_fd)) as control:
        control.setblocking(True)
        while not line.endswith(b"\n") and len(line) < MAX_LINE:
            try:
                waiting = control.recv(65536, socket.MSG_PEEK)
            except ConnectionError:
                return b""
            if not waiting:
                return b""
            end = waiting.find(b"\n") + 1 or len(waiting)
            line += control.recv(end)
    return line
