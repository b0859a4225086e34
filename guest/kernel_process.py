"""The one kernel of this guest: how it is started, what became of it.

The agent opens the five listening vsock sockets, writes the connection file for the kernel's user, and starts
the command in the cgroup `kernel` (cgroup.py). An ipykernel is started through `kernel.py`, which adopts the
sockets; any other command is started as it is.
"""

from __future__ import annotations

import json
import os
import select
import socket
import threading

import cgroup
import system
from agent_protocol import (
    CHANNEL_FDS_VARIABLE,
    CHANNEL_PORTS,
    MAX_STACKS,
    STACKS_FD_VARIABLE,
    STACKS_SIGNAL,
)
from children import Children, Plan
from command import command
from settings import Settings
from tail import Tail

_PATIENCE = 0.2
"""Seconds that the last output may take to arrive when the kernel has ended."""
_SIGINT, _SIGKILL, _SIGCONT = 2, 9, 18
_FIRST = 1
"""The lowest of the priorities that come before all ordinary ones; the agent's is higher."""
_HURRY = 1.5
"""Seconds."""
_FIRST_STACK, _NEXT_STACK = 2000, 200
"""Milliseconds until the stacks begin to come, and until no more of them come."""


class Order:
    """The kernel that the host asks for; `connection` goes into its connection file beside the endpoints."""

    def __init__(self, argv: list[str], env: dict[str, str], cwd: str, connection: dict[str, object]) -> None:
        self.argv, self.env, self.cwd, self.connection = argv, env, cwd, connection


class KernelProcess:
    """A started kernel."""

    def __init__(
        self,
        children: Children,
        settings: Settings,
        order: Order,
        inherit: tuple[int, ...] = (),
    ) -> None:
        """Starts it.

        Args:
            children: where it is started.
            settings: its user and places.
            order: its command and what belongs to it.
            inherit: further descriptors that it keeps, same number.

        Raises:
            OSError: it cannot be executed; nothing is left of the attempt.
        """
        self._children = children
        self._settings = settings
        self.status: dict[str, object] = {}
        file = f"{settings.run}/connection.json"
        self._connection_file, self._written = -1, 0
        self._stacks, self._says_stacks = -1, False
        # The kernel's user owns the folder last of all, so that nothing can be put in the place of a file.
        os.mkdir(settings.run, 0o700)
        listeners: dict[str, socket.socket] = {}
        try:
            for channel, port in CHANNEL_PORTS.items():
                listeners[channel] = listen(settings, port, 8)
            self._connection_file = _new_file(file, settings)
            self.rename(order.connection)
            if os.getuid() == 0:
                os.chown(settings.run, settings.uid, settings.gid)
            self.pid = self._start(
                order, command(order.argv, file, settings.python, settings.launcher), listeners, inherit
            )
        except BaseException:
            self._close_files()
            _remove(settings.run)
            raise
        finally:
            for listener in listeners.values():
                listener.close()
        self._over, over = os.pipe2(os.O_CLOEXEC)
        threading.Thread(target=self._await, args=(over,), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self.signal(0)

    def wait(self, peer: int) -> dict[str, object] | None:
        """Blocks until the kernel has ended, or whoever wants to know is gone.

        Args:
            peer: descriptor of the connection that asks.

        Returns:
            The status as the protocol's `wait` describes it; None when the peer is gone.
        """
        poll = select.poll()
        poll.register(self._over, select.POLLIN)
        poll.register(peer, select.POLLRDHUP)
        ready = {fd for fd, _ in poll.poll()}
        return self.status if self._over in ready else None

    def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group; False when the kernel has ended."""
        if number == _SIGINT:
            self._hurry()
        sent = self._children.signal(self.pid, number)
        if number == _SIGINT and sent and self._stopped():
            self._children.signal(self.pid, _SIGCONT)
        return sent

    def _hurry(self) -> None:
        """Lets the kernel itself run before all that it has started, for as long as an interrupt should take.

        Else it has to share the CPU with thousands of processes that a fork bomb has made (sched(7)).
        """
        if os.getuid() == 0:
            self._schedule(os.SCHED_RR | os.SCHED_RESET_ON_FORK, _FIRST)
            calm = threading.Timer(_HURRY, self._schedule, (os.SCHED_OTHER, 0))
            calm.daemon = True
            calm.start()

    def _schedule(self, policy: int, priority: int) -> None:
        try:
            for thread in os.listdir(f"/proc/{self.pid}/task"):
                os.sched_setscheduler(int(thread), policy, os.sched_param(priority))
        except OSError:
            pass  # it, or one of its threads, has just ended

    def _stopped(self) -> bool:
        """Whether somebody has stopped it (proc_pid_stat(5))."""
        try:
            return system.read(f"/proc/{self.pid}/stat").rpartition(")")[2].split()[0] == "T"
        except OSError:
            return False

    def stacks(self) -> bytes:
        """What each of its threads is doing, as faulthandler writes it; empty when it does not say."""
        if not self._says_stacks:
            return b""
        while self._read_stacks():
            pass  # of an earlier time, or somebody's idea of a joke
        self.signal(_SIGCONT)
        self._children.signal_one(self.pid, STACKS_SIGNAL)
        text = b""
        poll = select.poll()
        poll.register(self._stacks, select.POLLIN)
        patience = _FIRST_STACK
        while len(text) < MAX_STACKS and poll.poll(patience):
            piece = self._read_stacks()
            if not piece:
                break
            text += piece
            patience = _NEXT_STACK
        return text[:MAX_STACKS]

    def _read_stacks(self) -> bytes:
        try:
            return os.read(self._stacks, MAX_STACKS)
        except BlockingIOError:
            return b""

    def end(self) -> None:
        """Kills it, waits until it is gone, and takes back what it was given; nobody may use it any more."""
        self.signal(_SIGKILL)
        select.select([self._over], [], [])
        os.close(self._over)
        self._close_files()
        _remove(self._settings.run)

    def _close_files(self) -> None:
        for fd in (self._connection_file, self._stacks):
            if fd >= 0:
                os.close(fd)

    def rename(self, connection: dict[str, object]) -> None:
        """Writes its connection file: it has been given an identity, and no user's code has run yet."""
        content = {
            **connection,
            "transport": "ipc",
            "ip": f"{self._settings.run}/k",
            **{f"{channel}_port": number for number, channel in enumerate(CHANNEL_PORTS, 1)},
        }
        # Blanks in the place of what was longer: cheaper than to cut the file.
        text = json.dumps(content).encode().ljust(self._written)
        self._written = os.pwrite(self._connection_file, text, 0)

    def _start(
        self,
        order: Order,
        argv: list[str],
        listeners: dict[str, socket.socket],
        inherit: tuple[int, ...],
    ) -> int:
        settings = self._settings
        fds = {channel: listener.fileno() for channel, listener in listeners.items()}
        self._tail = Tail()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        # Who writes more stacks than are read loses them, and nobody waits.
        self._stacks, stacks = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._says_stacks = settings.launcher in argv
        env = {
            **settings.environment(),
            # An ipykernel whose parent is PID 1 believes that its parent died, unless it is told so.
            "JPY_PARENT_PID": "1",
            **order.env,
            CHANNEL_FDS_VARIABLE: json.dumps(fds),
            STACKS_FD_VARIABLE: str(stacks),
        }
        try:
            return self._children.start(
                Plan(
                    argv,
                    env,
                    order.cwd,
                    settings.uid,
                    settings.gid,
                    settings.kernel_cgroup,
                    null,
                    self._tail.writer,
                    (*fds.values(), stacks, *inherit),
                )
            )
        finally:
            os.close(null)
            os.close(stacks)
            self._tail.close_writer()

    def _await(self, over: int) -> None:
        status = self._children.wait(self.pid, None)
        assert status is not None
        code = os.waitstatus_to_exitcode(status)
        killed = code == -_SIGKILL
        self.status = {
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "out_of_memory": killed and cgroup.out_of_memory_kills(self._settings) > 0,
            "memory_peak": cgroup.number(self._settings, "memory.peak"),
            "tail": self._tail.text(_PATIENCE),
        }
        os.close(over)  # which the reading end shows to everybody who waits


def listen(settings: Settings, port: int, backlog: int) -> socket.socket:
    """A socket that listens on a port of this guest."""
    address: str | tuple[int, int]
    if settings.sockets:
        family, address = socket.AF_UNIX, f"{settings.sockets}/{port}"
        if os.path.exists(address):
            os.unlink(address)
    else:
        family, address = socket.AF_VSOCK, (socket.VMADDR_CID_ANY, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.bind(address)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, error.strerror, f"port {port}") from error
    return listener


def _new_file(path: str, settings: Settings) -> int:
    """A descriptor of a new file of the kernel's user alone."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    if os.getuid() == 0:
        os.fchown(fd, settings.uid, settings.gid)
    return fd


def _remove(folder: str) -> None:
    """Takes back the folder of a kernel that is no more: files and sockets, no folders."""
    try:
        for name in os.listdir(folder):
            os.unlink(f"{folder}/{name}")
        os.rmdir(folder)
    except OSError:
        pass
