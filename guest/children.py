"""Child processes of PID 1: started with everything decided beforehand, reaped in one place.

PID 1 inherits every orphan, so only one thread may call waitpid: `Children.reap_forever`, in the main
thread. Others start children here and wait for what it finds.

Rules. A child is registered under the lock that the reaper needs to record a status, so none can end
unnoticed. A signal is sent under the same lock and only to a child that has not been reaped, so its number
cannot belong to somebody else by then.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable

import system


class Plan:
    """How a program is to be started."""

    def __init__(
        self,
        argv: list[str],
        env: dict[str, str],
        cwd: str,
        uid: int,
        gid: int,
        cgroup: str,
        stdin: int,
        stdout: int,
        inherit: tuple[int, ...] = (),
    ) -> None:
        """`stdout` is also standard error; `inherit` lists further descriptors that it keeps, same number."""
        self.argv, self.env, self.cwd = argv, env, cwd
        self.uid, self.gid, self.cgroup = uid, gid, cgroup
        self.stdin, self.stdout, self.inherit = stdin, stdout, inherit


class Children:
    """The children that somebody waits for."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: set[int] = set()
        self._ended: dict[int, int] = {}

    def start(self, plan: Plan) -> int:
        """Starts a program in a session of its own and returns its PID, which is to be waited for.

        Raises:
            OSError: it could not be executed; `filename` is the program or the folder.
        """
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                with self._changed:
                    pid = os.fork()
                    if pid == 0:
                        _become(plan, writer)
                    self._running.add(pid)
            except OSError as error:
                raise OSError(error.errno, error.strerror, plan.argv[0]) from error
            finally:
                os.close(writer)
            failure = os.read(reader, 4096)  # nothing: exec has closed the other end
        finally:
            os.close(reader)
        if failure:
            self.wait(pid, None)
            number, _, name = failure.decode("utf-8", "replace").partition(" ")
            raise OSError(int(number), os.strerror(int(number)), name)
        return pid

    def wait(self, pid: int, timeout: float | None) -> int | None:
        """The wait status of a started child, once; None when it still runs after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while pid not in self._ended:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
            return self._ended.pop(pid)

    def signal(self, pid: int, number: int) -> bool:
        """Sends a signal to the process group of a started child; False when the child has ended."""
        return self._signal(pid, number, os.killpg)

    def signal_one(self, pid: int, number: int) -> bool:
        """The same, to the child alone."""
        return self._signal(pid, number, os.kill)

    def _signal(self, pid: int, number: int, send: Callable[[int, int], None]) -> bool:
        with self._changed:
            if pid not in self._running:
                return False
            try:
                send(pid, number)
            except ProcessLookupError:
                return False
            return True

    def watch(self, pid: int) -> int | None:
        """A descriptor that becomes readable when a started child ends; None when it has ended."""
        with self._changed:
            return os.pidfd_open(pid) if pid in self._running else None

    def reap(self) -> None:
        """Takes the status of every child that has ended."""
        while True:
            with self._changed:
                try:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                except ChildProcessError:
                    return
                if pid == 0:
                    return
                if pid in self._running:
                    self._running.discard(pid)
                    self._ended[pid] = status
                    self._changed.notify_all()

    def reap_forever(self) -> None:
        """The main thread's work, with SIGCHLD blocked in all threads."""
        while True:
            self.reap()
            signal.sigwait({signal.SIGCHLD})


def _become(plan: Plan, report: int) -> None:
    """In the child: turns into the program, or reports why not and exits."""
    name = plan.argv[0]
    try:
        if plan.cgroup:
            system.write(f"{plan.cgroup}/cgroup.procs", "0")
            system.write("/proc/self/oom_score_adj", "0")
            system.set_limits()
        os.setsid()
        if os.getuid() == 0:
            os.setgroups([plan.gid])
            os.setresgid(plan.gid, plan.gid, plan.gid)
            os.setresuid(plan.uid, plan.uid, plan.uid)
        system.no_new_privileges()
        name = plan.cwd
        os.chdir(plan.cwd)
        name = plan.argv[0]
        for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for fd in plan.inherit:
            os.set_inheritable(fd, True)
        for target, fd in enumerate((plan.stdin, plan.stdout, plan.stdout)):
            os.dup2(fd, target, inheritable=True)
        os.execvpe(plan.argv[0], plan.argv, plan.env)
    except OSError as error:
        os.write(report, f"{error.errno or errno.EINVAL} {name}".encode()[:4000])
    except BaseException:
        os.write(report, f"{errno.EINVAL} {name}".encode()[:4000])
    os._exit(127)
