"""The guest's agent on the host: real sockets, real children, this user instead of the guest's."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import kernel_process
import operations
from agent_protocol import HEADER, MAX_CONNECTIONS, pack, parse_header, parse_message
from children import Children, Plan
from operations import Operations
from server import Server


@pytest.fixture(autouse=True)
def this_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (operations, kernel_process):
        monkeypatch.setattr(module, "UID", os.getuid())
        monkeypatch.setattr(module, "GID", os.getgid())
        monkeypatch.setattr(module, "HOME", str(tmp_path))
    monkeypatch.setattr(operations, "CGROUP", None)


@pytest.fixture
def children() -> Iterator[Children]:
    """Reaps as PID 1 does, in a thread, for children that the tests start."""
    made = Children()
    done = threading.Event()

    def reap() -> None:
        while not done.wait(0.01):
            made.reap()

    thread = threading.Thread(target=reap)
    thread.start()
    yield made
    done.set()
    thread.join()


class Agent:
    """A server on a Unix socket, and a plain client of it."""

    def __init__(self, children: Children, path: str) -> None:
        self.path = path
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(64)
        server = Server(listener, Operations(children).perform, None)
        threading.Thread(target=server.serve_forever, daemon=True).start()

    def connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(20)
        connection.connect(self.path)
        return connection

    def ask(self, op: str, payload: bytes = b"", **fields: object) -> tuple[dict[str, object], bytes]:
        with self.connect() as connection:
            connection.sendall(pack({"op": op, **fields}, payload))
            return answer(connection)


def answer(connection: socket.socket) -> tuple[dict[str, object], bytes]:
    stream = connection.makefile("rb")
    json_length, payload_length = parse_header(stream.read(HEADER.size))
    return parse_message(stream.read(json_length)), stream.read(payload_length)


@pytest.fixture
def agent(children: Children, tmp_path: Path) -> Agent:
    return Agent(children, str(tmp_path / "agent"))


def run(agent: Agent, *argv: str, **fields: object) -> tuple[dict[str, object], bytes]:
    return agent.ask("exec", argv=list(argv), **fields)


def test_a_program_runs_and_its_output_and_status_come_back(agent: Agent) -> None:
    reply, output = run(agent, "sh", "-c", "echo out; echo err >&2; exit 3")
    assert reply == {"ok": True, "code": 3, "truncated": False, "timed_out": False}
    assert output == b"out\nerr\n"


def test_a_program_killed_by_a_signal_has_a_negative_code(agent: Agent) -> None:
    assert run(agent, "sh", "-c", "kill -9 $$")[0]["code"] == -9


def test_a_program_that_takes_too_long_is_killed_with_its_children(agent: Agent, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    reply, _ = run(agent, "sh", "-c", f"sleep 600 & echo $! > {file}; wait", seconds=0.3)
    assert reply["timed_out"] is True
    sleeper = Path("/proc", file.read_text().strip())
    deadline = time.monotonic() + 5
    while (
        sleeper.exists() and "zombie" not in (sleeper / "status").read_text() and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not sleeper.exists() or "zombie" in (sleeper / "status").read_text()


def test_output_beyond_the_limit_is_cut_and_said_to_be(agent: Agent) -> None:
    reply, output = run(agent, "sh", "-c", "head -c 6000000 /dev/zero")
    assert reply["truncated"] is True
    assert len(output) == operations.MAX_PAYLOAD


def test_a_program_that_does_not_exist_is_named(agent: Agent) -> None:
    reply, _ = run(agent, "/no/such/program")
    assert reply["ok"] is False
    assert "No such file or directory: /no/such/program" in str(reply["message"])


def test_a_signal_blocked_in_the_agent_reaches_its_children(agent: Agent) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
        assert run(agent, sys.executable, "-c", code)[1] == b"set()\n"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def test_files_are_written_and_read_in_pieces(agent: Agent, tmp_path: Path) -> None:
    assert agent.ask("write", b"hello", path="note.txt")[0] == {"ok": True, "size": 5}
    assert agent.ask("write", b" world", path="note.txt", offset=5)[0] == {"ok": True, "size": 11}
    assert agent.ask("read", path=str(tmp_path / "note.txt"), offset=6, length=3) == (
        {"ok": True, "size": 11},
        b"wor",
    )


def test_a_fifo_does_not_make_the_agent_wait(agent: Agent, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reply, _ = agent.ask("read", path=str(tmp_path / "fifo"))
    assert "is not a regular file" in str(reply["message"])


def test_a_link_in_place_of_a_file_is_not_followed(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    assert agent.ask("read", path=str(tmp_path / "link"))[0]["ok"] is False


@pytest.mark.parametrize(
    "request_",
    [{"op": "nonsense"}, {"op": 3}, {}, {"op": "signal", "number": 99}, {"op": "exec"}, {"op": "read"}],
)
def test_a_request_that_makes_no_sense_is_refused_and_the_agent_lives(
    agent: Agent, request_: dict[str, object]
) -> None:
    with agent.connect() as connection:
        connection.sendall(pack(request_))
        assert answer(connection)[0]["ok"] is False
        connection.sendall(pack({"op": "hello"}))
        assert answer(connection)[0]["ok"] is True


def test_a_stalled_connection_harms_nobody(agent: Agent) -> None:
    with agent.connect() as stalled:
        stalled.sendall(b"S")
        assert agent.ask("hello")[0]["ok"] is True


def test_connections_beyond_the_limit_are_closed_and_places_come_free(agent: Agent) -> None:
    held = [agent.connect() for _ in range(MAX_CONNECTIONS)]
    for connection in held:
        connection.sendall(pack({"op": "hello"}))
        assert answer(connection)[0]["ok"] is True
    with agent.connect() as refused:
        assert refused.recv(1) == b""
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert agent.ask("hello")[0]["ok"] is True
            return
        except (OSError, Exception) as error:  # the freed places are not seen at once
            last = error
    raise AssertionError(last)


def test_a_signal_or_a_wait_without_a_kernel_is_refused(agent: Agent) -> None:
    assert agent.ask("signal", number=2)[0]["error"] == "not started"
    assert agent.ask("wait")[0]["error"] == "not started"


def test_a_child_is_waited_for_once_and_only_by_whom_it_concerns(children: Children) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    plan = Plan(
        ["sh", "-c", "exit 7"], dict(os.environ), "/", os.getuid(), os.getgid(), None, null, null, null
    )
    pid = children.start(plan)
    assert children.wait(pid, 10) == 7 << 8
    assert not children.runs(pid)
    os.close(null)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ["python", "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            ["/usr/bin/python3", kernel_process.LAUNCHER, "ipykernel_launcher", "-f", "/c.json"],
        ),
        (
            ["/x/python3.11", "-X", "dev", "-m", "ipykernel", "-f", "{connection_file}"],
            ["/usr/bin/python3", "-X", "dev", kernel_process.LAUNCHER, "ipykernel", "-f", "/c.json"],
        ),
        (["python3", "-m", "bash_kernel"], ["/usr/bin/python3", "-m", "bash_kernel"]),
        (["ark", "--file={connection_file}"], ["ark", "--file=/c.json"]),
    ],
)
def test_an_ipykernel_is_started_through_the_launcher(argv: list[str], expected: list[str]) -> None:
    assert kernel_process.command(argv, "/c.json") == expected
