"""The client's handle on a supervisor: a plain child process and a socket, usable from any thread.

Jupyter's synchronous manager runs each provisioner method with an event loop of its own, on whatever thread
called. So nothing here belongs to a loop: calls block, one request at a time, and whoever must not block
runs them in a thread. `kill` waits for nobody.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from sandbox_kernel.errors import GuestError
from sandbox_kernel.supervisor.control import MAX_LINE, LaunchRequest, from_line, raise_failure, to_line

LAUNCH_GRACE = 15.0
"""Seconds beyond boot_timeout after which a silent supervisor is given up."""
_ANSWER = 15.0
_CLEANED = 5.0


class SupervisorHandle:
    """A running supervisor."""

    def __init__(self) -> None:
        """Starts the process.

        It gets a session of its own (a Ctrl-C in the client's terminal is the client's business) and no
        folder of the client's on its module path.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "sandbox_kernel.supervisor",
                    str(theirs.fileno()),
                    str(os.getpid()),
                ],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket = ours
        self._buffer = b""
        self._turn = threading.Lock()

    @property
    def pid(self) -> int:
        """Process id of the supervisor."""
        return self._process.pid

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
        except GuestError:
            if self.poll() is None:
                raise
            return False

    def status(self) -> dict[str, Any]:
        """What the guest's agent reports, and the seconds of each phase of the start."""
        return self._ask(to_line({"op": "status"}), _ANSWER)

    def stop(self) -> None:
        """Asks for an orderly end; does not wait for it."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def kill(self) -> None:
        """Ends the supervisor and with it the VM, at once."""
        if self._process.poll() is None:
            self._process.kill()

    def poll(self) -> int | None:
        """The exit status, as a shell would show it for a signal; None while it runs."""
        status = self._process.poll()
        return 128 - status if status is not None and status < 0 else status

    def wait(self) -> int:
        """Waits until the supervisor has ended and its guardian has cleaned up; releases the handle."""
        status = self._process.wait()
        deadline = time.monotonic() + _CLEANED
        with suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                readable, _, _ = select.select([self._socket], [], [], left)
                if readable and not self._socket.recv(4096):
                    break  # the last holder of the other end, the guardian, is done
        self._socket.close()
        return 128 - status if status < 0 else status

    def _ask(self, line: bytes, timeout: float) -> dict[str, Any]:
        with self._turn:
            try:
                self._socket.settimeout(timeout)
                self._socket.sendall(line)
                answer = from_line(self._read_line(time.monotonic() + timeout))
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


def summary(trace: Mapping[str, float]) -> str:
    """The phases of a start on one line, for a log: `booted 4.10 s · kernel connected 7.93 s`."""
    return " · ".join(f"{phase} {seconds:.2f} s" for phase, seconds in trace.items())
