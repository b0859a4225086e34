"""The guest's agent on the host: real sockets, real children, without cgroups, and a plain client of it."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from agent_protocol import HEADER, pack, parse_header, parse_message
from children import Children
from operations import Operations
from sandbox_kernel.resources import guest_dir
from server import Server
from settings import Settings


def settings_for(home: Path, uid: int | None = None, gid: int | None = None) -> Settings:
    """The guest's settings with another user (this one), home and folders, and without cgroups."""
    sockets = home / "ports"
    sockets.mkdir()
    return Settings(
        uid=os.getuid() if uid is None else uid,
        gid=os.getgid() if gid is None else gid,
        user=pwd.getpwuid(os.getuid() if uid is None else uid).pw_name,
        home=str(home),
        run=str(home / "run"),
        cgroups="",
        sockets=str(sockets),
        python=sys.executable,
        launcher=str(guest_dir() / "kernel.py"),
    )


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder that everybody may enter, whose path leaves room for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="ska-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


@contextlib.contextmanager
def reaped() -> Iterator[Children]:
    """Children that a thread reaps as PID 1 does."""
    made = Children()
    done = threading.Event()

    def reap() -> None:
        while not done.wait(0.01):
            made.reap()

    thread = threading.Thread(target=reap)
    thread.start()
    try:
        yield made
    finally:
        done.set()
        thread.join()


class Agent:
    """A server on a Unix socket, and a plain client of it."""

    def __init__(self, children: Children, settings: Settings, frame_seconds: float = 30.0) -> None:
        self.settings = settings
        self.path = f"{settings.sockets}/agent"
        self.ended = threading.Event()
        """Set when the machine would have been ended."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(64)
        self.operations = Operations(children, settings, {"agent": 1.5}, self.ended.set)
        self.server = Server(listener, self.operations.perform, None, frame_seconds)
        self.server.start()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(self.path)
        return connection

    def ask(self, op: str, payload: bytes = b"", **fields: object) -> tuple[dict[str, object], bytes]:
        """One request on a connection of its own."""
        with self.connect() as connection:
            connection.sendall(pack({"op": op, **fields}, payload))
            return answer(connection)

    def run(self, *argv: str, **fields: object) -> tuple[dict[str, object], bytes]:
        return self.ask("exec", argv=list(argv), **fields)


def answer(connection: socket.socket) -> tuple[dict[str, object], bytes]:
    """The next answer on a connection."""
    with connection.makefile("rb") as stream:
        json_length, payload_length = parse_header(stream.read(HEADER.size))
        return parse_message(stream.read(json_length)), stream.read(payload_length)
