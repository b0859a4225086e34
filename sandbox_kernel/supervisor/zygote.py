"""`python -m sandbox_kernel.supervisor.zygote FD`: forks supervisors from a warm interpreter.

A fork costs milliseconds where a new interpreter with its imports costs a tenth of a second, and what was
imported is shared by all. The zygote has one thread, no event loop and no ZMQ context; it reads requests from
a socket, and ends when that is closed or its parent has ended, which its children do not notice:

    → "fork", with the supervisor's end of a control socket
    ← the child's process id in decimal, with a pidfd of it
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable

from sandbox_kernel.errors import HostError
from sandbox_kernel.supervisor.handle import SupervisorHandle
from sandbox_kernel.supervisor.lifeline import Ward

_FORK = b"fork"
_PATIENCE = 10.0


class Zygote:
    """A running zygote, from the outside."""

    def __init__(self) -> None:
        """Starts it; it dies with this process."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "sandbox_kernel.supervisor.zygote", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._socket.settimeout(_PATIENCE)
        self._turn = threading.Lock()  # an answer belongs to the request before it

    @property
    def pid(self) -> int:
        """Process id of the zygote."""
        return self._process.pid

    def fork(self) -> tuple[Ward, socket.socket]:
        """A new supervisor, and the client's end of its control socket; blocks for some milliseconds.

        From any thread. A zygote that has failed once is of no more use.

        Raises:
            HostError: the zygote is gone, or cannot fork.
        """
        ours, theirs = socket.socketpair()
        try:
            with theirs, self._turn:
                socket.send_fds(self._socket, [_FORK], [theirs.fileno()])
                answer, fds, _, _ = socket.recv_fds(self._socket, 64, 1, socket.MSG_CMSG_CLOEXEC)
            if not fds:
                raise ConnectionResetError("it has ended")
            return Ward(int(answer), fds[0]), ours
        except (OSError, ValueError) as error:
            ours.close()
            self._socket.close()  # an answer that comes late would be taken for the next request's
            raise HostError(
                f"The zygote (process {self.pid}) starts no supervisor ({error}); "
                f"restart process {os.getpid()}, whose it is."
            ) from error

    def supervisor(self) -> SupervisorHandle:
        """A new supervisor as a client's handle; see `fork`."""
        return SupervisorHandle(*self.fork())

    def forget(self) -> None:
        """In a forked child: it is the parent's, so only this end of its socket is closed here."""
        self._socket.close()

    def close(self) -> None:
        """Ends it; its children go on."""
        self._socket.close()
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Forks on request until the other end is closed."""
    # With everything that a supervisor needs.
    from sandbox_kernel.jail import lender  # noqa: F401
    from sandbox_kernel.supervisor import entry, process  # noqa: F401

    requests = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # Linux then collects the children by itself
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.collect()
    gc.freeze()
    wake = select.poll()
    wake.register(requests, select.POLLIN)
    # A child of our parent's may keep the socket open when the parent has ended.
    wake.register(os.pidfd_open(os.getppid()), select.POLLIN)
    while requests.fileno() in {fd for fd, _ in wake.poll()}:
        message, fds, _, _ = socket.recv_fds(requests, 64, 1, socket.MSG_CMSG_CLOEXEC)
        if not message:
            return
        if message != _FORK or len(fds) != 1:
            continue
        pid = os.fork()
        if pid == 0:
            requests.close()
            _become(entry.run, fds[0])
        os.close(fds[0])
        pidfd = os.pidfd_open(pid)
        socket.send_fds(requests, [str(pid).encode()], [pidfd])
        os.close(pidfd)


def _become(run: Callable[[int], int], control_fd: int) -> None:
    """In the child: turns into a supervisor, and never comes back."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.set_inheritable(control_fd, True)  # as for one that was executed: its guardian holds it, too
        status = run(control_fd)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
