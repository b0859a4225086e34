"""The client of an agent that may be hostile."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_kernel.agent.client import AgentClient, Configuration, Started
from sandbox_kernel.agent.protocol import HEADER, MAGIC, PROTOCOL_VERSION, pack, parse_header, parse_message
from sandbox_kernel.errors import GuestError, GuestProtocolError, KernelStartError


@contextlib.asynccontextmanager
async def agent_that_answers(*answers: bytes) -> AsyncIterator[AgentClient]:
    """A client whose agent has its answers ready, whatever it is asked, and then closes."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = AgentClient(ours)
    theirs.sendall(b"".join(answers))
    theirs.shutdown(socket.SHUT_WR)
    try:
        yield client
    finally:
        await client.aclose()
        theirs.close()


async def test_a_kernel_that_cannot_start_is_reported_with_the_agents_sentence() -> None:
    refusal = pack({"ok": False, "error": "start", "message": "No such\x1b[31m program:\n nope."})
    async with agent_that_answers(refusal) as client:
        with pytest.raises(KernelStartError, match=r"^No such \[31m program: nope\.$"):
            await client.start(["nope"], {}, {})


@pytest.mark.parametrize(
    "answer",
    [
        b"GET / HTTP/1.1\r\n",
        HEADER.pack(MAGIC, PROTOCOL_VERSION, 2**31, 0),
        HEADER.pack(MAGIC, PROTOCOL_VERSION, 2, 2**31),
        HEADER.pack(MAGIC, PROTOCOL_VERSION, 2, 0) + b"[]",
        pack({"ok": True}),
        pack({"ok": True, "alive": "yes"}),
        pack({"ok": "true", "alive": True}),
        pack({"ok": False}),
    ],
)
async def test_an_answer_that_breaks_the_protocol_is_the_guests_fault(answer: bytes) -> None:
    async with agent_that_answers(answer) as client:
        with pytest.raises(GuestProtocolError):
            await client.signal(2)


async def test_an_agent_that_goes_away_is_an_error_of_its_own() -> None:
    async with agent_that_answers() as client:
        with pytest.raises(GuestError, match="broke"):
            await client.hello()


async def test_a_call_that_timed_out_poisons_the_connection() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = AgentClient(ours)
    with pytest.raises(TimeoutError):
        await client.call("hello", timeout=0.01)
    assert theirs.recv(4096)
    assert theirs.recv(1) == b""
    with pytest.raises(GuestError, match="is closed"):
        await client.signal(0)
    await client.aclose()
    theirs.close()


async def test_a_cancelled_call_closes_the_connection() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = AgentClient(ours)
    waiting = asyncio.ensure_future(client.wait())
    await asyncio.get_running_loop().run_in_executor(None, theirs.recv, 4096)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert theirs.recv(1) == b""
    with pytest.raises(GuestError, match="is closed"):
        await client.hello()
    theirs.close()


async def test_closing_wakes_a_call_that_waits_and_those_behind_it() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = AgentClient(ours)
    calls = [asyncio.ensure_future(client.wait()), asyncio.ensure_future(client.hello())]
    await asyncio.get_running_loop().run_in_executor(None, theirs.recv, 4096)
    await client.aclose()
    for result in await asyncio.gather(*calls, return_exceptions=True):
        assert isinstance(result, GuestError)
    assert ours.fileno() == -1
    theirs.close()


async def test_a_request_too_large_is_refused_before_it_is_sent() -> None:
    async with agent_that_answers(pack({"ok": True, "alive": True})) as client:
        with pytest.raises(GuestError, match="too large"):
            await client.exec(["true"], {"X": "y" * 300_000})
        assert await client.signal(0) is True


async def test_a_payload_that_nobody_asked_for_breaks_the_protocol() -> None:
    async with agent_that_answers(pack({"ok": True, "alive": True}, b"x")) as client:
        with pytest.raises(GuestProtocolError, match="nobody asked for"):
            await client.signal(0)


async def test_calls_at_once_wait_for_each_other() -> None:
    answers = [pack({"ok": True, "alive": alive}) for alive in (True, False, True)]
    async with agent_that_answers(*answers) as client:
        assert await asyncio.gather(*(client.signal(0) for _ in answers)) == [True, False, True]


async def test_more_of_a_file_than_asked_for_is_refused() -> None:
    async with agent_that_answers(pack({"ok": True, "size": 3}, b"abc")) as client:
        with pytest.raises(GuestProtocolError, match="more of a file"):
            await client.read("/x", length=2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.sampled_from(
            ["ok", "code", "signal", "out_of_memory", "tail", "memory_current", "alive", "error"]
        ),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=40)
        | st.lists(st.integers()),
    ),
    st.binary(max_size=200),
)
async def test_any_answer_is_a_result_or_one_of_our_errors(
    message: dict[str, object], payload: bytes
) -> None:
    for ask in ("wait", "status", "hello"):
        async with agent_that_answers(pack(message, payload)) as client:
            with contextlib.suppress(GuestError):
                await getattr(client, ask)()


async def test_a_clock_is_set_well_although_exchanges_are_slow() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    reader, writer = await asyncio.open_connection(sock=theirs)
    behind = 3_000_000_000
    delays = iter([0.2, 0.01, 0.2, 0.0])

    async def serve() -> None:
        nonlocal behind
        while True:
            json_length, payload_length = parse_header(await reader.readexactly(HEADER.size))
            request = parse_message(await reader.readexactly(json_length + payload_length))
            step = request.get("step", 0)
            assert isinstance(step, int)
            behind -= step
            now = time.time_ns() - behind
            await asyncio.sleep(next(delays, 0.0))
            writer.write(pack({"ok": True, "clock": now}))

    agent = asyncio.create_task(serve())
    client = AgentClient(ours)
    try:
        error = await client.synchronise()
        assert error < 0.1
        assert abs(behind) / 1e9 <= error + 0.001
    finally:
        agent.cancel()
        await client.aclose()
        writer.close()


async def asked(answer: dict[str, object], ask: Callable[[AgentClient], Awaitable[object]]) -> list[object]:
    """The request that `ask` makes of an agent that answers so, its payload, and what `ask` returns."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    client = AgentClient(ours)
    with theirs:
        theirs.sendall(pack(answer))
        result = await ask(client)
        await client.aclose()
        with theirs.makefile("rb") as stream:
            json_length, payload_length = parse_header(stream.read(HEADER.size))
            return [parse_message(stream.read(json_length)), stream.read(payload_length), result]


async def test_a_configuration_travels_by_itself_with_the_start_and_with_its_rehearsal() -> None:
    configuration = Configuration(clock=5, hostname="h", entropy=b"e", pids=99)
    fields = {"clock": 5, "hostname": "h", "pids": 99}
    assert await asked({"ok": True, "clock": 1}, lambda agent: agent.configure(configuration)) == [
        {"op": "configure"} | fields,
        b"e",
        None,
    ]
    assert await asked({"ok": True}, lambda agent: agent.rehearse(configuration)) == [
        {"op": "rehearse", "configuration": fields},
        b"e",
        None,
    ]
    order = {"op": "start", "argv": ["a"], "env": {}, "connection": {}}
    answer: dict[str, object] = {"ok": True, "pid": 9, "adopted": True, "clock": 6}
    reserving = replace(configuration, reserve=1)
    assert await asked(
        answer, lambda agent: agent.start(["a"], {}, {}, cwd="/x", configuration=reserving)
    ) == [
        order | {"cwd": "/x", "configuration": fields | {"reserve": 1}},
        b"e",
        Started(9, True, 6),
    ]
    assert await asked(answer, lambda agent: agent.start(["a"], {}, {})) == [order, b"", Started(9, True, 6)]


@pytest.mark.parametrize("clock", [-1, 2**63, "now", None])
async def test_a_clock_that_is_none_is_the_guests_fault(clock: object) -> None:
    async with agent_that_answers(pack({"ok": True, "clock": clock})) as client:
        with pytest.raises(GuestProtocolError):
            await client.synchronise()
