"""The one kernel of this guest: how it is started, what became of it.

The agent opens the five listening vsock sockets, writes the connection file for the kernel's user, and
starts the command in the cgroup `kernel`, which bounds its memory (so that the agent stays alive when it is
used up) and its processes. An ipykernel is started through `kernel.py`, which adopts the sockets; any other
command is started as it is.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading

from agent_protocol import CHANNEL_FDS_VARIABLE, CHANNEL_PORTS
from children import Children, Plan

HOME = "/home/sandbox"
USER, UID, GID = "sandbox", 1000, 1000
PYTHON = "/usr/bin/python3"
LAUNCHER = "/usr/lib/sandbox-kernel/kernel.py"
CGROUP = "/sys/fs/cgroup/kernel"
ENVIRONMENT = {
    "HOME": HOME,
    "USER": USER,
    "LOGNAME": USER,
    "SHELL": "/bin/bash",
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    # An ipykernel whose parent is PID 1 believes that its parent died, unless it is told so.
    "JPY_PARENT_PID": "1",
}
_PYTHON_NAME = re.compile(r"python[0-9.]*")
_KERNEL_MODULES = ("ipykernel_launcher", "ipykernel")
_TAIL = 4096
_CONSOLE_BUDGET = 64 * 1024


def command(argv: list[str], connection_file: str) -> list[str]:
    """The command for a kernel's argv: the placeholder filled in, ipykernel by way of the launcher."""
    words = [word.replace("{connection_file}", connection_file) for word in argv]
    if _PYTHON_NAME.fullmatch(os.path.basename(words[0])):
        words[0] = PYTHON
        if "-m" in words and words.index("-m") + 1 < len(words):
            at = words.index("-m")
            if words[at + 1] in _KERNEL_MODULES:
                return [*words[:at], LAUNCHER, *words[at + 1 :]]
    return words


class Tail:
    """The end of what the kernel writes to its standard output and error, most of it also on the console."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe2(os.O_CLOEXEC)
        self._text = b""
        self._budget = _CONSOLE_BUDGET
        self._ended = threading.Event()
        threading.Thread(target=self._copy, daemon=True).start()

    def close_writer(self) -> None:
        """To be called once the kernel has its copy."""
        os.close(self.writer)

    def text(self, patience: float) -> str:
        """The last characters, once the kernel has closed its end or `patience` seconds have passed."""
        self._ended.wait(patience)
        return self._text.decode("utf-8", "replace")

    def _copy(self) -> None:
        while data := os.read(self._reader, 65536):
            self._text = (self._text + data)[-_TAIL:]
            if self._budget > 0:
                os.write(1, data[: self._budget])
                self._budget -= len(data)
        os.close(self._reader)
        self._ended.set()


class KernelProcess:
    """A started kernel."""

    def __init__(self, children: Children, folder: str, request: dict[str, object]) -> None:
        """Starts it.

        Args:
            children: where it is waited for.
            folder: private folder for the connection file and the kernel's own sockets, made here.
            request: `argv`, `env`, `connection` of the `start` operation.

        Raises:
            OSError: the command cannot be executed.
            ValueError: the request is not what the protocol says.
        """
        argv, env, connection = _checked(request)
        os.mkdir(folder, 0o700)
        os.chown(folder, UID, GID)
        file = f"{folder}/connection.json"
        listeners = {channel: _listen(port) for channel, port in CHANNEL_PORTS.items()}
        _write_connection_file(file, f"{folder}/k", connection)
        fds = {channel: listener.fileno() for channel, listener in listeners.items()}
        self._tail = Tail()
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            plan = Plan(
                command(argv, file),
                {**ENVIRONMENT, **env, CHANNEL_FDS_VARIABLE: json.dumps(fds)},
                HOME,
                UID,
                GID,
                CGROUP,
                null,
                self._tail.writer,
                self._tail.writer,
                tuple(fds.values()),
            )
            self.pid = children.start(plan)
        finally:
            os.close(null)
            self._tail.close_writer()
            for listener in listeners.values():
                listener.close()
        self._children = children
        self._ended = threading.Event()
        self.status: dict[str, object] = {}
        threading.Thread(target=self._await, daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return not self._ended.is_set()

    def wait(self) -> dict[str, object]:
        """Blocks until the kernel has ended; its status as the protocol's `wait` describes it."""
        self._ended.wait()
        return self.status

    def signal(self, number: int) -> bool:
        """Sends a signal to the kernel's process group; False when the kernel has ended."""
        if not self.alive:
            return False
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            return False
        return True

    def _await(self) -> None:
        status = self._children.wait(self.pid, None)
        assert status is not None
        code = os.waitstatus_to_exitcode(status)
        self.status = {
            "code": code if code >= 0 else None,
            "signal": -code if code < 0 else None,
            "out_of_memory": read_counters("memory.events").get("oom_kill", 0) > 0,
            "tail": self._tail.text(0.2),
        }
        self._ended.set()


def read_counters(name: str) -> dict[str, int]:
    """A file of the kernel's cgroup with a counter a line."""
    try:
        with open(f"{CGROUP}/{name}") as file:
            return {key: int(value) for key, value in (line.split() for line in file)}
    except (OSError, ValueError):
        return {}


def _checked(request: dict[str, object]) -> tuple[list[str], dict[str, str], dict[str, object]]:
    argv, env, connection = request.get("argv"), request.get("env"), request.get("connection")
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise ValueError("argv must be a list of strings")
    if not isinstance(env, dict) or not all(isinstance(v, str) and "=" not in k for k, v in env.items()):
        raise ValueError("env must map names to strings")
    if not isinstance(connection, dict):
        raise ValueError("connection must be an object")
    return argv, env, connection


def _listen(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    listener.bind((socket.VMADDR_CID_ANY, port))
    listener.listen(8)
    return listener


def _write_connection_file(file: str, address: str, connection: dict[str, object]) -> None:
    content = {
        **connection,
        "transport": "ipc",
        "ip": address,
        **{f"{channel}_port": number for number, channel in enumerate(CHANNEL_PORTS, 1)},
    }
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as stream:
        json.dump(content, stream)
    os.chown(file, UID, GID)
