"""The client's handle on a supervisor: a process and a socket, usable from any thread.

Jupyter's synchronous manager runs each provisioner method with an event loop of its own, on whatever thread
called. So nothing here belongs to a loop: calls block, one request at a time, and whoever must not block
runs them in a thread. `kill` waits for nobody.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from typing import Any

from sandbox_kernel.death import Death
from sandbox_kernel.errors import ConfigurationError, GuestError
from sandbox_kernel.supervisor.control import (
    MAX_LINE,
    LaunchRequest,
    PrepareRequest,
    from_line,
    raise_failure,
    to_line,
)
from sandbox_kernel.supervisor.lifeline import Child, Lifeline

LAUNCH_GRACE = 15.0
"""Seconds beyond boot_timeout after which a silent supervisor is given up."""
_ANSWER = 15.0
_CLEANED = 5.0


class SupervisorHandle:
    """A running supervisor."""

    def __init__(self, lifeline: Lifeline, control: socket.socket) -> None:
        """Takes over a supervisor's process and the client's end of its socket; see also `spawn`."""
        self._lifeline = lifeline
        self._socket = control
        self._buffer = b""
        self._told: int | None = None
        self.death: Death | None = None
        """Why the kernel died, once the supervisor has ended; None when its end was asked for."""
        self._turn = threading.Lock()

    @classmethod
    def spawn(cls) -> SupervisorHandle:
        """Starts a supervisor as a child of this process."""
        ours, theirs = socket.socketpair()
        with theirs:
            return cls(Child(theirs), ours)

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._lifeline.pid

    def prepare(self, request: PrepareRequest) -> dict[str, Any]:
        """Has a VM ready for a later `launch`, and returns what the supervisor tells of it.

        Raises:
            SandboxKernelError: the supervisor's own error, with its sentence.
        """
        return self._ask(request.to_line(), request.spec.boot_timeout + LAUNCH_GRACE)

    def launch(self, request: LaunchRequest) -> dict[str, Any]:
        """Boots the VM, starts the kernel, and returns what the supervisor tells of it.

        Raises:
            SandboxKernelError: the supervisor's own error, with its sentence.
        """
        return self._ask(request.to_line(), request.spec.boot_timeout + LAUNCH_GRACE)

    def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group; False when the kernel is dead."""
        try:
            return bool(self._ask(to_line({"op": "signal", "number": number}), _ANSWER).get("alive"))
        except GuestError as error:
            if not isinstance(error.__cause__, OSError) or isinstance(error.__cause__, TimeoutError):
                raise
            return False  # it has hung up: nobody is left to get a signal

    def status(self) -> dict[str, Any]:
        """What the guest's agent reports, and the seconds of each phase of the start."""
        return self._ask(to_line({"op": "status"}), _ANSWER)

    def usage(self) -> dict[str, Any]:
        """What the VM uses, as in usage.py."""
        return dict(self._ask(to_line({"op": "usage"}), _ANSWER)["usage"])

    def stop(self) -> None:
        """Asks for an orderly end; does not wait for it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Ends the supervisor and with it the VM, at once."""
        self._lifeline.kill()

    def poll(self) -> int | None:
        """The exit status, as a shell would show it for a signal; None while it runs."""
        if self._lifeline.poll(self._told) is None:
            return None
        if self._told is None and self._turn.acquire(blocking=False):
            try:
                self._hear(0)
            finally:
                self._turn.release()
        return self._lifeline.poll(self._told)

    def wait(self) -> int:
        """Waits until the supervisor has ended and its guardian has cleaned up; releases the handle."""
        self._lifeline.wait()
        with self._turn:
            self._hear(_CLEANED)
        status = self._lifeline.poll(self._told)
        self._lifeline.close()
        self._socket.close()
        assert status is not None
        return status

    def forget(self) -> None:
        """In a forked child: it is the parent's, so only this process's descriptors are closed."""
        self._lifeline.close()
        self._socket.close()

    def _hear(self, seconds: float) -> None:
        """Takes what an ended supervisor has still sent; the end of that is its guardian's end."""
        deadline = time.monotonic() + seconds
        with suppress(OSError):
            while True:
                self._socket.settimeout(max(0.001, deadline - time.monotonic()))
                data = self._socket.recv(65536)
                if not data or len(self._buffer) > MAX_LINE:
                    break
                self._buffer += data
        for line in self._buffer.splitlines():
            self._note_end(line)

    def _note_end(self, line: bytes) -> bool:
        """Whether `line` is the supervisor's last one, which has its status."""
        try:
            last = from_line(line)
        except ConfigurationError:
            return False
        status, death = last.get("ended"), last.get("death")
        if isinstance(death, dict):
            with suppress(GuestError):
                self.death = Death.from_dict(death)
        if isinstance(status, int) and 0 <= status <= 255:
            self._told = status
        return status is not None

    def _ask(self, line: bytes, timeout: float) -> dict[str, Any]:
        with self._turn:
            try:
                self._socket.settimeout(timeout)
                self._socket.sendall(line)
                line = self._read_line(time.monotonic() + timeout)
                if self._note_end(line):
                    raise ConnectionResetError("the supervisor has said its last word")
                answer = from_line(line)
            except TimeoutError as error:
                raise GuestError(
                    f"The VM's supervisor (process {self.pid}) did not answer within {timeout:g} s; "
                    "restart the kernel."
                ) from error
            except OSError as error:
                raise GuestError(
                    f"The VM's supervisor (process {self.pid}) has ended; restart the kernel."
                ) from error
        raise_failure(answer)
        return answer

    def _read_line(self, deadline: float) -> bytes:
        while b"\n" not in self._buffer:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(65536)
            if not data or len(self._buffer) > MAX_LINE:
                raise ConnectionResetError("the supervisor closed its socket")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
