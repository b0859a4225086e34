"""Exposed ports on the host: real sockets, with the guest's real agent behind them, or one that lies."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from guest_agent import Agent, reaped, settings_for, short_folder

from sandbox_kernel.agent.client import AgentClient
from sandbox_kernel.agent.protocol import HEADER, MAGIC, PROTOCOL_VERSION, pack
from sandbox_kernel.errors import ConfigurationError, GuestProtocolError
from sandbox_kernel.exposure import Exposure
from sandbox_kernel.ports.door import ASKING, Door, Places
from sandbox_kernel.ports.listener import Listener, is_free
from sandbox_kernel.ports.pump import Pump

LARGE = 8 << 20
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def never(port: int) -> socket.socket:
    await asyncio.Event().wait()
    raise AssertionError


def occupied(listener: Listener) -> set[tuple[str, int]]:
    return {each.getsockname()[:2] for each in listener.sockets}


class Rig:
    """An agent, programs in its guest, and doors to them."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.doors: list[Door] = []
        self.servers: list[asyncio.Server] = []
        self.violations: list[GuestProtocolError] = []

    async def reach(self, port: int) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, self.agent.path)
        client = AgentClient(connection)
        try:
            return await client.connect(port)
        finally:
            await client.aclose()

    async def serve(self, serve: Serve) -> int:
        """A program in the guest; its port."""
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        self.servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    def door(
        self,
        exposure: Exposure,
        places: Places | None = None,
        reach: Callable[[int], Awaitable[socket.socket]] | None = None,
        half_open: float = 60.0,
    ) -> Door:
        door = Door(
            Listener(exposure), reach or self.reach, places or Places(), self.violations.append, half_open
        )
        self.doors.append(door)
        door.open()
        return door


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    with reaped() as children, short_folder() as home:
        made = Rig(Agent(children, settings_for(home)))
        yield made
        for door in made.doors:
            await door.aclose()
        for server in made.servers:
            server.close()


async def connect(door: Door) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if door.exposure.path:
        return await asyncio.open_unix_connection(door.exposure.path)
    return await asyncio.open_connection("127.0.0.1", door.exposure.port)


async def echo_at_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read())
    writer.close()


async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


@pytest.mark.parametrize("how", ["port", "socket"])
async def test_much_arrives_whole_both_ways_and_each_ends_by_itself(
    rig: Rig, tmp_path: Path, how: str
) -> None:
    port = await rig.serve(echo_at_the_end)
    door = rig.door(Exposure(port) if how == "port" else Exposure(port, None, f"{tmp_path}/s"))
    reader, writer = await connect(door)
    data = os.urandom(LARGE)
    writer.write(data)
    writer.write_eof()
    got = await asyncio.wait_for(reader.read(), 30)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
    writer.close()


async def test_the_guest_may_end_its_way_first(rig: Rig) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        got.set_result(await reader.read())
        writer.close()

    reader, writer = await connect(rig.door(Exposure(await rig.serve(serve))))
    assert await asyncio.wait_for(reader.read(), 10) == b"bye"
    writer.write(b"still here")
    writer.write_eof()
    assert await asyncio.wait_for(got, 10) == b"still here"
    writer.close()


async def test_a_port_that_nobody_listens_on_breaks_the_connection_off_at_once(
    rig: Rig, tmp_path: Path
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        reader, writer = await connect(rig.door(Exposure(port)))
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
        reader, writer = await connect(rig.door(Exposure(port, None, f"{tmp_path}/s")))
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
    assert not rig.violations


async def test_more_connections_than_places_wait_and_are_served_in_the_end(rig: Rig) -> None:
    door = rig.door(Exposure(await rig.serve(echo_at_the_end)), Places(connections=3))
    connections = [await connect(door) for _ in range(8)]
    for number, (_, writer) in enumerate(connections):
        writer.write(b"%d" % number)
    for number, (reader, writer) in enumerate(connections):
        writer.write_eof()
        assert await asyncio.wait_for(reader.read(), 10) == b"%d" % number
        writer.close()


async def test_few_ask_the_agent_at_a_time_and_a_port_that_hangs_leaves_others_their_turn(rig: Rig) -> None:
    asking, most = 0, 0

    async def hang(port: int) -> socket.socket:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        return await never(port)

    places = Places()
    deaf = rig.door(Exposure(9), places, hang)
    connections = [await connect(deaf) for _ in range(10)]
    await asyncio.sleep(0.2)
    assert 0 < most < ASKING
    reader, writer = await connect(rig.door(Exposure(await rig.serve(echo_at_the_end)), places))
    writer.write(b"x")
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 10) == b"x"
    for _, each in [*connections, (reader, writer)]:
        each.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n\r\n",
        HEADER.pack(MAGIC, PROTOCOL_VERSION, 2**31, 0),
        pack({"ok": "yes"}),
        pack({"ok": True}, b"payload"),
        pack({"ok": False, "error": "refused"}),
    ],
)
async def test_an_agent_that_breaks_the_protocol_is_reported_and_its_client_cut_off(
    rig: Rig, answer: bytes
) -> None:
    async def reach(port: int) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            theirs.sendall(answer)
            return await AgentClient(ours).connect(port)

    reader, writer = await connect(rig.door(Exposure(9), reach=reach))
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 10)
    writer.close()
    assert len(rig.violations) == 1


@pytest.mark.parametrize("error", [TimeoutError("no answer"), ConnectionRefusedError("gone")])
async def test_an_agent_that_does_not_answer_costs_the_connection_alone(rig: Rig, error: Exception) -> None:
    async def reach(port: int) -> socket.socket:
        raise error

    door = rig.door(Exposure(9), Places(connections=1), reach)
    for _ in range(2):
        reader, writer = await connect(door)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 10)
        writer.close()
    assert not rig.violations


async def test_an_answer_takes_nothing_of_what_comes_after_it() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        theirs.sendall(pack({"ok": True}) + b"first bytes")
        client = AgentClient(ours)
        with await client.connect(80) as connection:
            await client.aclose()
            assert not client.usable
            assert connection.recv(100) == b"first bytes"


async def test_a_client_that_is_gone_does_not_keep_its_place_for_ever(rig: Rig) -> None:
    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        await asyncio.sleep(60)

    door = rig.door(Exposure(await rig.serve(keep)), Places(connections=1), half_open=0.2)
    _, writer = await connect(door)
    writer.close()
    other, writer = await connect(door)
    writer.write_eof()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(other.read(), 10)
    writer.close()


async def test_half_open_is_not_idle_while_something_comes() -> None:
    (one, client), (other, guest) = socket.socketpair(), socket.socketpair()
    for each in (one, client, other, guest):
        each.setblocking(False)
    with one, client, other, guest:
        running = asyncio.ensure_future(Pump(one, other, half_open=0.5).run())
        client.shutdown(socket.SHUT_WR)
        for _ in range(10):
            await asyncio.sleep(0.1)
            guest.send(b"x")
        assert not running.done()
        guest.shutdown(socket.SHUT_WR)
        assert await asyncio.wait_for(running, 10)
        assert client.recv(100) == b"x" * 10


async def test_sides_that_are_always_ready_leave_others_their_turn() -> None:
    (one, client), (other, guest) = socket.socketpair(), socket.socketpair()
    for each in (one, client, other, guest):
        each.setblocking(False)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    with one, client, other, guest:
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while sent < 1 << 18:
                sent += client.send(bytes(1 << 15))
        assert sent > 3 << 16
        running = asyncio.ensure_future(Pump(one, other).run())
        got = 0
        while got < sent:
            await asyncio.sleep(0)
            with contextlib.suppress(BlockingIOError):
                came = len(guest.recv(1 << 20))
                assert came <= 2 << 16
                got += came
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_a_reader_that_waits_holds_its_writer_up() -> None:
    (one, client), (other, guest) = socket.socketpair(), socket.socketpair()
    for each in (one, client, other, guest):
        each.setblocking(False)
    with one, client, other, guest:
        running = asyncio.ensure_future(Pump(one, other).run())
        sent = 0
        for _ in range(100):
            try:
                sent += guest.send(bytes(1 << 16))
            except BlockingIOError:
                await asyncio.sleep(0.01)
        assert sent < 2 << 20
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def test_closing_a_door_cuts_its_connections_off_and_frees_its_address(
    rig: Rig, tmp_path: Path
) -> None:
    port = await rig.serve(stay)
    for exposure in (Exposure(port), Exposure(port, None, f"{tmp_path}/s")):
        door = rig.door(exposure)
        reader, writer = await connect(door)
        await asyncio.sleep(0.1)
        await door.aclose()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        Listener(door.exposure).close()
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_the_system_chooses_a_port_and_nothing_but_the_loopback_is_bound() -> None:
    listener = Listener(Exposure(80))
    try:
        port = listener.exposure.port
        assert port
        expected = {("127.0.0.1", port)}
        if Path("/proc/net/if_inet6").exists() and Path("/proc/net/if_inet6").read_text():
            expected.add(("::1", port))
        assert occupied(listener) == expected
        assert not is_free(port)
    finally:
        listener.close()
    assert is_free(port)


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::1"])
def test_a_port_that_is_taken_is_named_with_what_to_do(address: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as taken:
        try:
            taken.bind((address, 0))
        except OSError:
            pytest.skip("this machine has no such address")
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError) as caught:
            Listener(Exposure(80, port))
    assert str(caught.value) == (
        f"Port 80 of the VM cannot be exposed at port {port} of this host, as somebody listens there "
        "already; choose another one in `expose`, or none for any that is free."
    )


def test_a_socket_is_for_its_user_alone_and_goes_with_its_listener(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(Exposure(80, None, str(path)))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    listener.close()
    listener.close()
    assert not path.exists()


def test_a_socket_that_a_killed_process_left_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.is_socket()
    listener = Listener(Exposure(80, None, str(path)))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    listener.close()


@pytest.mark.parametrize("what", ["file", "link", "listener"])
def test_anything_else_at_a_sockets_path_stays_and_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as busy:
        if what == "file":
            path.write_text("mine")
        elif what == "link":
            path.symlink_to("nowhere")
        else:
            busy.bind(str(path))
            busy.listen()
        with pytest.raises(ConfigurationError) as caught:
            Listener(Exposure(80, None, str(path)))
    assert str(caught.value) == (
        f"Port 80 of the VM cannot be exposed at {path}, as something is there already; remove it, or choose "
        "another path in `expose`."
    )
    assert path.is_symlink() or path.exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Listener(Exposure(80, None, f"{tmp_path}/none/s"))
    assert str(caught.value) == (
        f"Port 80 of the VM cannot be exposed at {tmp_path}/none/s (No such file or directory); choose "
        "another path in `expose`."
    )


def test_what_another_has_put_in_a_sockets_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener(Exposure(80, None, str(path)))
    path.unlink()
    path.write_text("another's")
    listener.close()
    assert path.read_text() == "another's"
