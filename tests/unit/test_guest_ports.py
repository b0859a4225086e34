"""The agent's `connect`, on the host: real sockets on the loopback, and all that can go wrong with them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from guest_agent import Agent, answer, reaped, settings_for, short_folder

from agent_protocol import HEADER, MAX_CONNECTIONS, MAX_PORT_CONNECTIONS, pack, parse_header, parse_message
from ports import Ports

LARGE = 8 << 20


@pytest.fixture
def agent() -> Iterator[Agent]:
    with reaped() as children, short_folder() as home:
        yield Agent(children, settings_for(home))


@contextlib.contextmanager
def served(serve: Callable[[socket.socket], None], family: int = socket.AF_INET) -> Iterator[int]:
    """A port on which each connection is served by a thread."""
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        listener.listen(200)

        def work(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                serve(connection)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    threading.Thread(target=work, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side ends its way."""
    with connection.makefile("rb") as stream:
        return stream.read()


def echo_at_the_end(connection: socket.socket) -> None:
    connection.sendall(everything(connection))


def stay(connection: socket.socket) -> None:
    connection.recv(1)


def reach(agent: Agent, port: object) -> tuple[socket.socket, dict[str, object]]:
    connection = agent.connect()
    connection.sendall(pack({"op": "connect", "port": port}))
    json_length, _ = parse_header(exactly(connection, HEADER.size))
    return connection, parse_message(exactly(connection, json_length))


def exactly(connection: socket.socket, count: int) -> bytes:
    """That many bytes, and not one that comes after them."""
    data = b""
    while len(data) < count:
        data += connection.recv(count - len(data))
    return data


def settled(agent: Agent, count: int) -> bool:
    deadline = time.monotonic() + 10
    while len(agent.operations._ports) != count and time.monotonic() < deadline:
        time.sleep(0.01)
    return len(agent.operations._ports) == count


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_what_is_sent_arrives_and_each_way_ends_by_itself(agent: Agent, family: int) -> None:
    if family == socket.AF_INET6 and not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    with served(echo_at_the_end, family) as port:
        connection, reply = reach(agent, port)
        with connection:
            assert reply == {"ok": True}
            data = os.urandom(LARGE)
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            assert everything(connection) == data
    assert settled(agent, 0)


def test_the_port_may_end_its_way_first(agent: Agent) -> None:
    got: list[bytes] = []
    done = threading.Event()

    def serve(connection: socket.socket) -> None:
        connection.sendall(b"bye")
        connection.shutdown(socket.SHUT_WR)
        got.append(everything(connection))
        done.set()

    with served(serve) as port:
        connection, _ = reach(agent, port)
        with connection:
            assert everything(connection) == b"bye"
            connection.sendall(b"still here")
            connection.shutdown(socket.SHUT_WR)
            assert done.wait(10)
    assert got == [b"still here"]


def test_both_ways_are_used_at_once_by_whoever_reads_slowly(agent: Agent) -> None:
    def serve(connection: socket.socket) -> None:
        sender = threading.Thread(target=connection.sendall, args=(data,))
        sender.start()
        while len(got) < LARGE and (piece := connection.recv(1 << 12)):
            got.extend(piece)
        sender.join()

    data, got = os.urandom(LARGE), bytearray()
    with served(serve) as port:
        connection, _ = reach(agent, port)
        with connection:
            sender = threading.Thread(target=connection.sendall, args=(data,))
            sender.start()
            time.sleep(0.2)
            assert everything(connection) == data
            sender.join()
    assert got == data


def test_a_port_that_nobody_listens_on_is_refused_at_once(agent: Agent) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        connection, reply = reach(agent, port)
        with connection:
            message = f"Port {port} has nobody who listens."
            assert reply == {"ok": False, "error": "refused", "message": message}
            assert connection.recv(1) == b""
    assert settled(agent, 0)


@pytest.mark.parametrize("port", [0, 65536, -1, "80", None, True, 1.5])
def test_what_is_no_port_is_refused_and_the_connection_goes_on(agent: Agent, port: object) -> None:
    connection, reply = reach(agent, port)
    with connection:
        assert (reply["ok"], reply["error"]) == (False, "malformed")
        connection.sendall(pack({"op": "hello"}))
        assert answer(connection)[0]["ok"] is True


def test_a_port_that_does_not_accept_is_given_up(agent: Agent) -> None:
    agent.operations._ports = Ports(patience=0.5)
    with socket.socket() as deaf, contextlib.ExitStack() as stack:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(4):  # what its backlog holds
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        time.sleep(0.1)
        connection, reply = reach(agent, deaf.getsockname()[1])
        stack.enter_context(connection)
        assert reply["message"] == f"Port {deaf.getsockname()[1]} does not accept connections."
    assert settled(agent, 0)


def test_open_connections_leave_the_agents_places_alone_and_one_too_many_is_refused(agent: Agent) -> None:
    assert MAX_PORT_CONNECTIONS > MAX_CONNECTIONS
    with contextlib.ExitStack() as stack, served(stay) as port:
        for _ in range(MAX_PORT_CONNECTIONS):
            connection, reply = reach(agent, port)
            stack.enter_context(connection)
            assert reply == {"ok": True}
        connection, reply = reach(agent, port)
        stack.enter_context(connection)
        assert reply["message"] == "connect: there are 96 connections, which is the most"
        assert agent.ask("hello")[0]["ok"] is True
        assert agent.run("true")[0]["code"] == 0
    assert settled(agent, 0)
    with served(stay) as port:
        connection, reply = reach(agent, port)
        connection.close()
        assert reply == {"ok": True}


def test_a_host_that_is_gone_ends_a_connection_that_the_port_would_keep(agent: Agent) -> None:
    ended = threading.Event()

    def keep(connection: socket.socket) -> None:
        everything(connection)
        ended.wait(10)

    with served(keep) as port:
        connection, _ = reach(agent, port)
        connection.sendall(b"x")
        connection.close()
        assert settled(agent, 0)
        ended.set()


def test_a_port_that_breaks_off_ends_both_ways(agent: Agent) -> None:
    def reset(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with served(reset) as port:
        connection, _ = reach(agent, port)
        with connection:
            connection.sendall(b"x")
            assert connection.recv(1) == b""
            assert settled(agent, 0)


def test_an_idle_connection_costs_no_time(agent: Agent) -> None:
    with contextlib.ExitStack() as stack, served(stay) as port:
        for _ in range(2):
            stack.enter_context(reach(agent, port)[0])
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(1)
        assert time.process_time() - before < 0.5  # a loop that spins takes all of it
