"""The guest's agent on the host: what it answers, and that nothing a caller or a program does stops it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
from guest_agent import Agent, answer, reaped, settings_for, short_folder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_protocol import (
    HEADER,
    MAX_CONNECTIONS,
    MAX_ENTROPY,
    MAX_PAYLOAD,
    OPERATIONS,
    pack,
    parse_header,
    parse_message,
)
from answer import Answer, Refused
from children import Children, Plan
from server import Server


@pytest.fixture
def children() -> Iterator[Children]:
    with reaped() as made:
        yield made


@pytest.fixture
def home() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture
def agent(children: Children, home: Path) -> Agent:
    return Agent(children, settings_for(home))


def test_hello_says_who_is_there(agent: Agent) -> None:
    reply, _ = agent.ask("hello")
    assert reply["kernel"] == os.uname().release
    assert reply["python"] == sys.version.split()[0]
    assert isinstance(reply["uptime"], float)
    assert reply["boot"] == {"agent": 1.5}


def test_every_operation_of_the_protocol_is_there(agent: Agent) -> None:
    for op in OPERATIONS - {"shutdown", "configure"}:  # without cgroups and as an ordinary user
        assert agent.ask(op)[0].get("error") != "unknown", op


def test_a_program_runs_and_its_output_and_status_come_back(agent: Agent) -> None:
    reply, output = agent.run("sh", "-c", "echo out; echo err >&2; exit 3")
    assert reply == {"ok": True, "code": 3, "truncated": False, "timed_out": False}
    assert output == b"out\nerr\n"


def test_a_program_killed_by_a_signal_has_a_negative_code(agent: Agent) -> None:
    assert agent.run("sh", "-c", "kill -9 $$")[0]["code"] == -9


def test_a_program_that_takes_too_long_is_killed_with_its_children(agent: Agent, home: Path) -> None:
    file = home / "pid"
    reply, _ = agent.run("sh", "-c", f"sleep 600 & echo $! > {file}; wait", seconds=0.5)
    assert reply["timed_out"] is True
    assert reply["code"] == -signal.SIGKILL
    assert ends(int(file.read_text()))


def test_a_program_ends_when_it_ends_though_a_child_keeps_its_output_open(agent: Agent, home: Path) -> None:
    file = home / "pid"
    reply, output = agent.run("sh", "-c", f"sleep 600 & echo $! > {file}; echo done", seconds=100)
    os.kill(int(file.read_text()), signal.SIGKILL)
    assert reply == {"ok": True, "code": 0, "truncated": False, "timed_out": False}
    assert output == b"done\n"


def test_a_program_that_closes_its_output_early_is_still_waited_for(agent: Agent) -> None:
    assert agent.run("sh", "-c", "exec >&- 2>&-; sleep 0.2; exit 4")[0]["code"] == 4


def test_output_beyond_the_limit_is_cut_and_said_to_be(agent: Agent) -> None:
    reply, output = agent.run("sh", "-c", "head -c 6000000 /dev/zero")
    assert reply["truncated"] is True
    assert len(output) == MAX_PAYLOAD


def test_a_program_that_does_not_exist_is_named(agent: Agent) -> None:
    reply, _ = agent.run("/no/such/program")
    assert reply["ok"] is False
    assert "No such file or directory: /no/such/program" in str(reply["message"])


def test_a_folder_that_does_not_exist_is_named(agent: Agent) -> None:
    assert "No such file or directory: /no/such/folder" in str(
        agent.run("true", cwd="/no/such/folder")[0]["message"]
    )


def test_a_program_inherits_nothing_of_the_agents_but_its_three_streams(agent: Agent) -> None:
    ours = {fd for fd in range(3, 1024) if inherited(fd)}  # what started the tests may have left some
    there = {int(name) for name in agent.run("ls", "/proc/self/fd")[1].split()}
    assert len(there - ours - {0, 1, 2}) == 1  # through which ls reads the folder


def test_a_signal_blocked_in_the_agent_reaches_its_children(agent: Agent) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        code = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
        assert agent.run(sys.executable, "-c", code)[1] == b"set()\n"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def test_no_program_can_gain_rights(agent: Agent) -> None:
    assert agent.run("grep", "NoNewPrivs", "/proc/self/status")[1] == b"NoNewPrivs:\t1\n"


@pytest.mark.parametrize(
    "request_",
    [
        {"op": "nonsense"},
        {"op": 3},
        {"op": ["hello"]},
        {"op": "perform"},
        {},
        {"op": "signal", "number": 99},
        {"op": "signal", "number": True},
        {"op": "exec"},
        {"op": "exec", "argv": []},
        {"op": "exec", "argv": [""]},
        {"op": "exec", "argv": ["a\0b"]},
        {"op": "exec", "argv": ["true"], "seconds": 1e300},
        {"op": "exec", "argv": ["true"], "env": {"A=B": "c"}},
        {"op": "start", "argv": ["true"], "env": {"": "c"}, "connection": {}},
        {"op": "start", "argv": ["true"], "env": {}, "connection": []},
        {"op": "read"},
        {"op": "read", "path": "x", "offset": 10**400},
        {"op": "read", "path": "x", "length": MAX_PAYLOAD + 1},
        {"op": "write", "path": "\ud800", "mode": 0o4755},
        {"op": "configure", "clock": 10**30},
        {"op": "configure", "pids": 0},
        {"op": "configure", "hostname": "x" * 65},
        {"op": "start", "argv": ["true"], "env": {}, "connection": {}, "configuration": []},
        {"op": "start", "argv": ["true"], "env": {}, "connection": {}, "configuration": {"pids": 15}},
        {"op": "start", "argv": ["true"], "env": {}, "connection": {}, "configuration": {"reserve": -1}},
        {"op": "rehearse", "configuration": None},
        {"op": "rehearse", "configuration": {"clock": "now"}},
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_the_agent_lives(
    agent: Agent, request_: dict[str, object]
) -> None:
    with agent.connect() as connection:
        connection.sendall(pack(request_))
        reply, _ = answer(connection)
        assert reply["ok"] is False
        assert reply["error"] in ("unknown", "malformed")
        connection.sendall(pack({"op": "hello"}))
        assert answer(connection)[0]["ok"] is True


def test_too_much_entropy_is_refused(agent: Agent) -> None:
    too_much = bytes(MAX_ENTROPY + 1)
    assert agent.ask("configure", too_much)[0]["error"] == "malformed"
    assert agent.ask("rehearse", too_much)[0]["error"] == "malformed"
    assert agent.ask("start", too_much, argv=["true"], connection={})[0]["error"] == "malformed"
    assert agent.ask("signal", number=0)[0]["error"] == "not started"


def test_without_a_kernel_that_stands_by_there_is_no_rehearsal(agent: Agent) -> None:
    assert agent.ask("rehearse")[0]["error"] == "no standby"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["hello", "start", "signal", "status", "exec", "read", "wait"]),
    st.dictionaries(
        st.sampled_from(["number", "path", "offset", "length", "seconds", "env", "cwd", "connection"]),
        json_values,
    ),
)
def test_any_fields_get_an_answer(agent: Agent, op: str, fields: dict[str, object]) -> None:
    """Without `argv`, so that no field can make the agent do something to this host."""
    assert isinstance(agent.ask(op, **fields)[0]["ok"], bool)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_leave_the_agent_alive(agent: Agent, data: bytes) -> None:
    with agent.connect() as connection, contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    assert agent.ask("hello")[0]["ok"] is True


def test_a_stalled_connection_harms_nobody(agent: Agent) -> None:
    with agent.connect() as stalled:
        stalled.sendall(b"S")
        assert agent.ask("hello")[0]["ok"] is True


def test_a_frame_that_does_not_become_complete_ends_its_connection(children: Children, home: Path) -> None:
    impatient = Agent(children, settings_for(home), frame_seconds=0.05)
    with impatient.connect() as stalled:
        stalled.sendall(b"SKA")
        assert stalled.recv(1) == b""


def test_connections_beyond_the_limit_are_closed_and_places_come_free(agent: Agent) -> None:
    held = [agent.connect() for _ in range(MAX_CONNECTIONS)]
    for connection in held:
        connection.sendall(pack({"op": "hello"}))
        assert answer(connection)[0]["ok"] is True
    with agent.connect() as refused:
        assert refused.recv(1) == b""
    for connection in held:
        connection.close()
    deadline = time.monotonic() + 20
    while True:  # a place is free when its thread has seen the end of its connection
        with agent.connect() as connection, contextlib.suppress(OSError):
            connection.sendall(pack({"op": "hello"}))
            if connection.recv(1):
                return
        assert time.monotonic() < deadline


def test_a_lack_of_threads_costs_a_connection_and_not_the_agent(home: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(home / "x"))
        listener.listen(8)
        server = Server(listener, lambda request, payload, peer: Answer({}), None)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = threading.stack_size(1 << 45)  # more than any address space: no thread starts
        try:
            with socket.socket(socket.AF_UNIX) as connection:
                connection.settimeout(20)
                connection.connect(str(home / "x"))
                assert connection.recv(1) == b""
        finally:
            threading.stack_size(before)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(home / "x"))
            connection.sendall(pack({"op": "hello"}))
            assert answer(connection)[0] == {"ok": True}


def test_only_the_hosts_cid_is_served() -> None:
    class Listener:
        """Two peers, by the addresses that AF_VSOCK gives; no vsock is needed to test the choice."""

        def __init__(self) -> None:
            self.ends = [socket.socketpair() for _ in range(2)]
            self.peers = [(self.ends[0][0], (3, 99)), (self.ends[1][0], (2, 99))]

        def accept(self) -> tuple[socket.socket, tuple[int, int]]:
            if not self.peers:
                raise OSError(9, "closed")
            return self.peers.pop(0)

    listener = Listener()
    Server(listener, lambda request, payload, peer: Answer({}), 2).start()  # type: ignore[arg-type]
    (_, stranger), (_, host) = listener.ends
    assert stranger.recv(1) == b""
    host.sendall(pack({"op": "hello"}))
    assert answer(host)[0] == {"ok": True}
    host.close()
    stranger.close()


def test_requests_that_come_at_once_or_in_pieces_are_answered_in_order(agent: Agent) -> None:
    frames = b"".join(
        pack({"op": "signal", "number": 99}, bytes(size)) + pack({"op": "hello"}) for size in (0, 9)
    )
    for cut in (len(frames), 1, 13, 100):
        with agent.connect() as connection:
            for at in range(0, len(frames), cut):
                connection.sendall(frames[at : at + cut])
            with connection.makefile("rb") as stream:
                assert [next_answer(stream)["ok"] for _ in range(4)] == [False, True, False, True]


def next_answer(stream: BinaryIO) -> dict[str, object]:
    json_length, payload_length = parse_header(stream.read(HEADER.size))
    return parse_message(stream.read(json_length + payload_length))


def test_an_answer_larger_than_any_buffer_arrives_whole(agent: Agent, home: Path) -> None:
    content = os.urandom(MAX_PAYLOAD)
    assert agent.ask("write", content, path="big")[0] == {"ok": True, "size": MAX_PAYLOAD}
    assert agent.ask("read", path="big")[1] == content


def test_a_peer_that_takes_no_answer_loses_its_connection(children: Children, home: Path) -> None:
    impatient = Agent(children, settings_for(home), frame_seconds=0.05)
    (home / "big").write_bytes(bytes(MAX_PAYLOAD))
    with impatient.connect() as deaf:
        deaf.sendall(pack({"op": "read", "path": "big"}))
        time.sleep(0.3)
        received = 0
        while piece := deaf.recv(1 << 20):
            received += len(piece)
        assert received < MAX_PAYLOAD


def admitted(agent: Agent) -> socket.socket:
    """A connection that is served; not all that were closed a moment ago may have been let go of yet."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        connection = agent.connect()
        with contextlib.suppress(OSError):
            connection.sendall(pack({"op": "hello"}))
            if connection.recv(1):
                return connection
        connection.close()
        time.sleep(0.01)
    raise AssertionError("nobody is served any more")


def test_threads_that_accept_are_kept_but_not_too_many(agent: Agent) -> None:
    assert agent.ask("hello")[0]["ok"] is True
    before = threading.active_count()
    for _ in range(3):
        held = [admitted(agent) for _ in range(MAX_CONNECTIONS)]
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before + 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert agent.ask("hello")[0]["ok"] is True


def test_a_refusal_is_cut_to_a_bearable_length() -> None:
    def refuse(request: dict[str, object], payload: bytes, peer: int) -> Answer:
        raise Refused("failed", "x" * 1_000_000)

    ours, theirs = socket.socketpair()
    with ours, theirs:
        Server(ours, refuse, None)._reply(ours, {}, b"")
        assert len(str(answer(theirs)[0]["message"])) == 2000


def test_the_machine_ends_after_the_answer_to_a_shutdown(agent: Agent) -> None:
    with agent.connect() as connection:
        connection.sendall(pack({"op": "shutdown"}))
        assert answer(connection)[0] == {"ok": True}
        assert not agent.ended.is_set()
    assert agent.ended.wait(20)


def test_a_signal_or_a_wait_without_a_kernel_is_refused(agent: Agent) -> None:
    assert agent.ask("signal", number=2)[0]["error"] == "not started"
    assert agent.ask("wait")[0]["error"] == "not started"


def test_a_child_is_waited_for_once_and_its_signals_end_with_it(children: Children) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    plan = Plan(["sh", "-c", "read x"], dict(os.environ), "/", os.getuid(), os.getgid(), "", null, null)
    pid = children.start(plan)
    assert children.wait(pid, 20) == 1 << 8
    assert children.signal(pid, 0) is False
    assert children.watch(pid) is None
    os.close(null)


def test_a_child_that_still_runs_can_be_signalled(children: Children) -> None:
    null = os.open("/dev/null", os.O_RDWR)
    plan = Plan(["sleep", "600"], dict(os.environ), "/", os.getuid(), os.getgid(), "", null, null)
    pid = children.start(plan)
    assert children.wait(pid, 0) is None
    assert children.signal(pid, 0) is True
    assert children.signal(pid, signal.SIGKILL) is True
    assert children.wait(pid, 20) == signal.SIGKILL
    os.close(null)


def inherited(fd: int) -> bool:
    try:
        return os.get_inheritable(fd)
    except OSError:
        return False


def ends(pid: int) -> bool:
    """Whether a process that nobody here waits for comes to its end."""
    deadline = time.monotonic() + 20
    status = Path("/proc", str(pid), "status")
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if "State:\tZ" not in status.read_text():
                time.sleep(0.01)
                continue
        return True
    return False


def test_a_clock_beyond_all_time_is_refused_and_the_agent_goes_on(agent: Agent) -> None:
    for _ in range(MAX_CONNECTIONS + 1):
        reply, _ = agent.ask("configure", step=2**63 - 1)
        assert reply["error"] == "malformed"
    assert agent.ask("hello")[0]["ok"] is True


def test_nesting_that_can_be_read_but_not_written_again_is_refused_and_the_agent_goes_on(
    agent: Agent,
) -> None:
    """The connection file is written from deeper in the agent than the request was read."""
    for depth in range(975, 1000):
        nested = "[" * depth + "]" * depth
        body = f'{{"op":"start","argv":["/no/such"],"connection":{{"k":{nested}}}}}'.encode()
        for _ in range(MAX_CONNECTIONS + 1):
            with agent.connect() as connection:
                connection.sendall(HEADER.pack(b"SKA", 1, len(body), 0) + body)
                connection.recv(1)
    assert agent.ask("hello")[0]["ok"] is True
